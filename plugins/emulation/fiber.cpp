#undef _FORTIFY_SOURCE  // its longjmp refuses to move to another stack
#include "fiber.h"

#include <sys/mman.h>
#include <ucontext.h>

#include <cstdint>
#include <cstdlib>
#include <new>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#define DMOE_SWITCH_BEGINS(keep, bottom, size) __sanitizer_start_switch_fiber(keep, bottom, size)
#define DMOE_SWITCH_ENDED(kept, bottom, size) __sanitizer_finish_switch_fiber(kept, bottom, size)
#else
#define DMOE_SWITCH_BEGINS(keep, bottom, size)
#define DMOE_SWITCH_ENDED(kept, bottom, size)
#endif

namespace dmoe::emulation {

namespace {
constexpr size_t kGuardBytes = 65536;  // a multiple of any page size; below the stack, not accessible
constexpr size_t kStackBytes = 131072;
}  // namespace

Fiber::Fiber(void (*body)()) : body_(body) {
    constexpr int kPrivate = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    void *memory = mmap(nullptr, kGuardBytes + kStackBytes, PROT_NONE, kPrivate, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    stack_ = static_cast<char *>(memory) + kGuardBytes;
    if (mprotect(stack_, kStackBytes, PROT_READ | PROT_WRITE) != 0) {
        munmap(memory, kGuardBytes + kStackBytes);
        throw std::bad_alloc();
    }
}

Fiber::~Fiber() { munmap(stack_ - kGuardBytes, kGuardBytes + kStackBytes); }

void Fiber::start(unsigned high, unsigned low) {
    reinterpret_cast<Fiber *>(static_cast<uintptr_t>(high) << 32 | low)->loop();
}

void Fiber::loop() {
    DMOE_SWITCH_ENDED(nullptr, &outside_bottom_, &outside_size_);
    for (;;) {
        body_();
        finished_ = true;
        leave();
    }
}

void Fiber::enter() {
    if (sigsetjmp(outside_, 0) == 0) {
        DMOE_SWITCH_BEGINS(&fake_outside_, stack_, kStackBytes);
        if (started_) siglongjmp(inside_, 1);
        started_ = true;
        ucontext_t context;
        if (getcontext(&context) != 0) std::abort();
        context.uc_stack.ss_sp = stack_;
        context.uc_stack.ss_size = kStackBytes;
        context.uc_link = nullptr;
        const auto self = reinterpret_cast<uintptr_t>(this);
        makecontext(&context, reinterpret_cast<void (*)()>(&Fiber::start), 2, static_cast<unsigned>(self >> 32),
                    static_cast<unsigned>(self));
        setcontext(&context);
        std::abort();  // setcontext only returns when it fails
    }
    DMOE_SWITCH_ENDED(fake_outside_, nullptr, nullptr);
}

void Fiber::leave() {
    if (sigsetjmp(inside_, 0) == 0) {
        DMOE_SWITCH_BEGINS(&fake_inside_, outside_bottom_, outside_size_);
        siglongjmp(outside_, 1);
    }
    DMOE_SWITCH_ENDED(fake_inside_, &outside_bottom_, &outside_size_);
}

}  // namespace dmoe::emulation
