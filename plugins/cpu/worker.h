// A thread that does what it is given, in this order.
#pragma once

#include <condition_variable>
#include <deque>
#include <functional>
#include <mutex>
#include <pthread.h>
#include <thread>

namespace dmoe::cpu {

class Worker {
public:
    explicit Worker(char const* name) // of the thread, at most 15 letters
        : mName(name)
    {
    }
    ~Worker() { close(); }

    void give(std::function<void()> work)
    {
        std::lock_guard<std::mutex> const guard(mMutex);
        if (mClosed) {
            return;
        }
        if (!mThread.joinable()) {
            mThread = std::thread([this] { run(); });
        }
        mWaiting.push_back(std::move(work));
        mChanged.notify_all();
    }

    // Until all that was given is done.
    void wait()
    {
        std::unique_lock<std::mutex> guard(mMutex);
        mChanged.wait(guard, [this] { return mClosed || (mWaiting.empty() && !mBusy); });
    }

    // What has not begun is dropped, and so is what is given from now on.
    void close()
    {
        {
            std::lock_guard<std::mutex> const guard(mMutex);
            mClosed = true;
            mWaiting.clear();
            mChanged.notify_all();
        }
        std::lock_guard<std::mutex> const one(mJoining);
        if (mThread.joinable()) {
            mThread.join();
        }
    }

private:
    void run()
    {
        pthread_setname_np(pthread_self(), mName);
        std::unique_lock<std::mutex> guard(mMutex);
        for (;;) {
            mChanged.wait(guard, [this] { return mClosed || !mWaiting.empty(); });
            if (mClosed) {
                return;
            }
            auto const work = std::move(mWaiting.front());
            mWaiting.pop_front();
            mBusy = true;
            guard.unlock();
            work();
            guard.lock();
            mBusy = false;
            mChanged.notify_all();
        }
    }

    char const* const mName;
    std::mutex mMutex, mJoining;
    std::condition_variable mChanged;
    std::deque<std::function<void()>> mWaiting;
    bool mBusy = false, mClosed = false;
    std::thread mThread;
};

} // namespace dmoe::cpu
