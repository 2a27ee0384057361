// A mapped weight file that somebody cuts short while it is read.
#pragma once

#include <atomic>

namespace dmoe::cpu {

// While one lives, a read of this thread behind the end of a mapped file gives zeros and sets `lost`, where it would end
// the process (SIGBUS). Whoever sees `lost` must not use what was computed, nor that mapping again.
class LostPages {
public:
    explicit LostPages(std::atomic<bool>& lost);
    ~LostPages();
    LostPages(LostPages const&) = delete;
    LostPages& operator=(LostPages const&) = delete;
};

// Makes the signal ours; other reads go on to the handler that was there. To be called now and then: others set theirs.
void catchLostPages();

} // namespace dmoe::cpu
