#include "session.h"

#include <array>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <set>
#include <stdexcept>
#include <string>

namespace {

constexpr std::array kOps = {
    "DmoeAddNorm",
    "DmoeAttention",
    "DmoeBlockRoute",
    "DmoeExperts",
    "DmoeHead",
    "DmoeLinear",
    "DmoeMixture",
    "DmoeQuantisedLinear",
    "DmoeRouter",
    "DmoeSelfAttention",
};

// Its place among the ops; kOps.size() for another op.
size_t placeOf(char const* op)
{
    size_t i = 0;
    while (i < kOps.size() && std::strcmp(kOps[i], op) != 0) {
        ++i;
    }
    return i;
}

// All sessions of the process: an address from a session option is taken for none that it is not.
std::mutex& oneAtATime()
{
    static auto* const mutex = new std::mutex;
    return *mutex;
}

std::set<DmoeSession*>& sessions()
{
    static auto* const all = new std::set<DmoeSession*>;
    return *all;
}

} // namespace

struct DmoeSession {
    DmoeAcquire acquire;
    DmoeRelease release;
    void* context;
    std::array<std::atomic<int64_t>, kOps.size()> kernels{};
    std::atomic<bool> fast{false};
    std::atomic<int32_t> expertsLayout{1};
};

DmoeSession* dmoe_session_create(DmoeAcquire acquire, DmoeRelease release, void* context)
{
    if ((acquire == nullptr) != (release == nullptr) || (acquire != nullptr && !dmoe::kAsksSource)) {
        return nullptr;
    }
    auto* const session = new DmoeSession{acquire, release, context};
    std::lock_guard<std::mutex> const guard(oneAtATime());
    sessions().insert(session);
    return session;
}

int64_t dmoe_session_kernels(DmoeSession const* session, char const* op)
{
    size_t const place = placeOf(op);
    return place < kOps.size() ? session->kernels[place].load() : 0;
}

void dmoe_session_set_products(DmoeSession* session, int32_t fast) { session->fast = fast != 0; }

void dmoe_session_set_experts_layout(DmoeSession* session, int32_t layout) { session->expertsLayout = layout; }

int32_t dmoe_session_activations(void) { return 2; }

namespace dmoe {

DmoeSession* sessionAt(char const* address)
{
    auto* const session = reinterpret_cast<DmoeSession*>(std::strtoull(address, nullptr, 10));
    std::lock_guard<std::mutex> const guard(oneAtATime());
    if (sessions().count(session) == 0) {
        throw std::runtime_error("dmoe.session is " + std::string(address)
            + ", no session that dmoe_session_create of this library has made.");
    }
    return session;
}

void countKernel(DmoeSession* session, char const* op)
{
    if (session != nullptr) {
        session->kernels.at(placeOf(op)) += 1;
    }
}

void requireExpertsLayout(DmoeSession const* session)
{
    int32_t const layout = session == nullptr ? 1 : session->expertsLayout.load();
    if (layout != kExpertsLayout) {
        throw std::runtime_error("the quantised experts lie in layout " + std::to_string(layout)
            + ", these kernels read layout " + std::to_string(kExpertsLayout)
            + " (1: rows, as in files; 2: fragments); open the bundle with dmoe-export, which gives them the right one.");
    }
}

bool fastProducts(DmoeSession const* session) { return session != nullptr && session->fast; }

HeldExperts::HeldExperts(DmoeSession const* session, void const* gateUp, int32_t* begin, int32_t* end)
    : mSession(session != nullptr && session->acquire != nullptr ? session : nullptr), mGateUp(gateUp), mBegin(begin),
      mCount(static_cast<int32_t>(end - begin))
{
    if (mSession == nullptr) {
        return;
    }
    int32_t const wanted = mCount;
    mCount = mSession->acquire(mSession->context, gateUp, begin, wanted);
    if (mCount <= 0 || mCount > wanted) {
        throw std::runtime_error("the expert source gave up.");
    }
}

HeldExperts::~HeldExperts()
{
    if (mSession != nullptr) {
        mSession->release(mSession->context, mGateUp, mBegin, mCount);
    }
}

} // namespace dmoe
