#include "lost_pages.h"

#include <csignal>
#include <cstdint>
#include <mutex>
#include <sys/mman.h>
#include <unistd.h>

namespace dmoe::cpu {
namespace {

// In memory that every thread has from its start: a signal handler must not allocate.
__attribute__((tls_model("initial-exec"))) thread_local std::atomic<bool>* watched = nullptr;

struct sigaction before; // whose turn it is when a read is not ours
std::atomic<bool> passedOn{false};

void onBusError(int number, siginfo_t* info, void* context)
{
    if (watched != nullptr) {
        auto const size = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
        void* const page = reinterpret_cast<void*>(reinterpret_cast<uintptr_t>(info->si_addr) & ~(size - 1));
        if (mmap(page, size, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) != MAP_FAILED) {
            watched->store(true);
            return; // the read happens again, and gets zeros
        }
    }
    bool const other = before.sa_handler != SIG_DFL && before.sa_handler != SIG_IGN;
    if (passedOn.exchange(true) || !other) {
        signal(number, SIG_DFL); // happens again, and ends the process
    } else if (before.sa_flags & SA_SIGINFO) {
        before.sa_sigaction(number, info, context);
    } else {
        before.sa_handler(number);
    }
}

} // namespace

LostPages::LostPages(std::atomic<bool>& lost) { watched = &lost; }
LostPages::~LostPages() { watched = nullptr; }

void catchLostPages()
{
    static std::mutex one;
    std::lock_guard<std::mutex> const guard(one);
    struct sigaction now {};
    if (sigaction(SIGBUS, nullptr, &now) != 0 || ((now.sa_flags & SA_SIGINFO) && now.sa_sigaction == onBusError)) {
        return;
    }
    before = now;
    struct sigaction ours {};
    ours.sa_sigaction = onBusError;
    ours.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigemptyset(&ours.sa_mask);
    sigaction(SIGBUS, &ours, nullptr);
}

} // namespace dmoe::cpu
