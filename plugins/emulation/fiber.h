// Stacks one can jump between. Started through ucontext, switched with sigsetjmp and siglongjmp: swapcontext alone
// would enter the kernel twice per switch for the signal mask.
#pragma once

#include <csetjmp>
#include <cstddef>

namespace dmoe::emulation {

// The stack that called enter(), and a fiber's own.
class Fiber {
public:
    // `body` is called again and again, each time until it returns (the fiber then counts as finished).
    explicit Fiber(void (*body)());
    ~Fiber();
    Fiber(const Fiber &) = delete;
    Fiber &operator=(const Fiber &) = delete;

    void enter();             // from outside: run until leave() or the end of the body
    void leave();             // from inside: back to the caller of enter()
    bool finished() const { return finished_; }
    void restart() { finished_ = false; }

private:
    static void start(unsigned high, unsigned low);
    void loop();

    void (*body_)();
    char *stack_ = nullptr;
    bool started_ = false, finished_ = true;
    sigjmp_buf inside_, outside_;
    // For the address sanitizer, which has to know which stack is in use.
    void *fake_inside_ = nullptr, *fake_outside_ = nullptr;
    const void *outside_bottom_ = nullptr;
    size_t outside_size_ = 0;
};

}  // namespace dmoe::emulation
