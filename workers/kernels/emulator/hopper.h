// The names of cuda/hopper.cuh on a CPU, from the PTX ISA's sections on mbarriers, bulk copies and wgmma.
//
// What is asynchronous on a GPU happens late here, or early, whichever shows a mistake: every other bulk copy is done
// at once, the rest only when its barrier is waited for; a wgmma reads shared memory and writes its sums at the wait.
#pragma once

#include <array>
#include <climits>
#include <deque>

#include "primitives.h"

// Eight bytes, as on a GPU. `phase` counts the completed phases.
struct MBarrier {
    unsigned phase;
    unsigned arrivals : 5, missing : 5;
    int bytes : 22;
};
static_assert(sizeof(MBarrier) == 8);

namespace emulator {

struct BulkCopy {
    void* to;
    const void* from;
    int bytes;
    MBarrier* barrier;
};

constexpr int WARPGROUP_LANES = 128;

struct Wgmma {
    int* d;
    std::array<unsigned, 4> a;
    uint64_t b;
    bool accumulate;
    int columns;
};

// Of each lane, the products that it has issued, committed in groups.
struct Warpgroup {
    Meeting meeting;
    Wgmma* operands[WARPGROUP_LANES];
    std::deque<Wgmma> issued[WARPGROUP_LANES];
    std::deque<std::deque<Wgmma>> committed[WARPGROUP_LANES];
};

inline std::vector<BulkCopy> bulk_copies;
inline bool copy_at_once = false;
inline std::vector<Warpgroup> warpgroups;

inline Warpgroup& warpgroup() { return warpgroups[machine.current / WARPGROUP_LANES]; }

inline void complete_if_due(MBarrier& barrier) {
    if (barrier.missing || barrier.bytes) return;
    barrier.missing = barrier.arrivals;
    ++barrier.phase;
}

inline void perform(const BulkCopy& copy) {
    std::memcpy(copy.to, copy.from, copy.bytes);
    copy.barrier->bytes -= copy.bytes;
    complete_if_due(*copy.barrier);
}

inline void perform_copies(MBarrier* barrier) {
    const std::vector<BulkCopy> all = std::move(bulk_copies);
    bulk_copies.clear();
    for (const BulkCopy& copy : all) {
        if (copy.barrier == barrier)
            perform(copy);
        else
            bulk_copies.push_back(copy);
    }
}

// Byte k of column n of B: rows of 128 bytes in atoms of 8, whose 16-byte pieces are swizzled by address bits 7–9.
inline int8_t element_of_b(uint64_t descriptor, int n, int k) {
    const unsigned start = (descriptor & 0x3FFF) << 4, stride = (descriptor >> 32 & 0x3FFF) << 4;
    const unsigned address = start + n / 8 * stride + n % 8 * 128 + k, swizzled = address ^ (address >> 7 & 7) << 4;
    if (swizzled >= SHARED_BYTES) fail("wgmma reads beyond shared memory");
    return static_cast<int8_t>(shared_memory[swizzled]);
}

// Lane 4g + t of warp w holds of A rows 16w + g and 16w + g + 8 (registers 0 and 1) of columns 4t …, and of columns
// 16 on in registers 2 and 3; of d, in elements 4j + 2p + e, row 16w + 8p + g and column 8j + 2t + e.
inline void multiply_warpgroup(Wgmma** lanes) {
    const Wgmma& common = *lanes[0];
    if (common.b >> 62 != 1 || common.b >> 49 & 7) fail("wgmma: only the 128-byte swizzle of aligned atoms");
    static int8_t left[64][32], right[256][32];
    for (int lane = 0; lane < WARPGROUP_LANES; ++lane) {
        const int row = lane / 32 * 16 + lane % 32 / 4, column = 4 * (lane % 4);
        const Wgmma& mine = *lanes[lane];
        if (mine.b != common.b || mine.accumulate != common.accumulate || mine.columns != common.columns)
            fail("lanes of a warpgroup disagree about a wgmma");
        for (int i = 0; i < 4; ++i)
            std::memcpy(&left[row + 8 * (i % 2)][column + 16 * (i / 2)], &mine.a[i], 4);
    }
    for (int n = 0; n < common.columns; ++n)
        for (int k = 0; k < 32; ++k) right[n][k] = element_of_b(common.b, n, k);
    for (int lane = 0; lane < WARPGROUP_LANES; ++lane)
        for (int i = 0; i < common.columns / 2; ++i) {
            const auto& row = left[lane / 32 * 16 + lane % 32 / 4 + 8 * (i / 2 % 2)];
            const auto& column = right[i / 4 * 8 + 2 * (lane % 4) + i % 2];
            int sum = 0;
            for (int k = 0; k < 32; ++k) sum += row[k] * column[k];
            int& d = lanes[lane]->d[i];
            store_sum(d, (common.accumulate ? static_cast<int64_t>(d) : 0) + sum);
        }
}

inline void perform_wgmma(Wgmma& mine) {
    Warpgroup& group = warpgroup();
    group.operands[machine.current % WARPGROUP_LANES] = &mine;
    meet(group.meeting, WARPGROUP_LANES, [&] { multiply_warpgroup(group.operands); });
}

}  // namespace emulator

inline void mbarrier_init(MBarrier* barrier, int arrivals) {
    check_aligned(barrier, 8);
    if (arrivals < 1 || arrivals > 31) emulator::fail("the emulator's barriers count to 31");
    *barrier = {0, static_cast<unsigned>(arrivals), static_cast<unsigned>(arrivals), 0};
}

// Also the start of a CTA: what an earlier one left undone when it failed is forgotten.
inline void mbarrier_init_fence() {
    emulator::bulk_copies.clear();
    emulator::warpgroups.clear();
    emulator::warpgroups.resize((emulator::machine.threads + 127) / emulator::WARPGROUP_LANES);
}

inline void mbarrier_arrive(MBarrier* barrier) {
    if (!barrier->missing) emulator::fail("a barrier has more arrivals than it expects");
    --barrier->missing;
    emulator::complete_if_due(*barrier);
}

inline void mbarrier_arrive_expect(MBarrier* barrier, int bytes) {
    barrier->bytes += bytes;
    mbarrier_arrive(barrier);
}

inline void mbarrier_wait(MBarrier* barrier, int parity) {
    emulator::perform_copies(barrier);
    while (static_cast<int>(barrier->phase & 1) == parity) {
        emulator::wait_while(barrier->phase, barrier->phase);
        emulator::perform_copies(barrier);
    }
}

inline void copy_bulk(void* shared, const void* global, int bytes, MBarrier* barrier) {
    check_aligned(shared, 16);
    check_aligned(global, 16);
    if (bytes % 16 || bytes <= 0) emulator::fail("a bulk copy of other than a multiple of 16 bytes");
    emulator::bulk_copies.push_back({shared, global, bytes, barrier});
    emulator::copy_at_once = !emulator::copy_at_once;
    if (emulator::copy_at_once) {
        emulator::perform(emulator::bulk_copies.back());
        emulator::bulk_copies.pop_back();
    }
}

template <int REGISTERS>
void take_registers() {}

template <int REGISTERS>
void give_registers() {}

inline void wgmma_fence() {}

inline void wgmma_commit() {
    emulator::Warpgroup& group = emulator::warpgroup();
    const int lane = emulator::machine.current % emulator::WARPGROUP_LANES;
    group.committed[lane].push_back(std::move(group.issued[lane]));
    group.issued[lane].clear();
}

template <int PENDING>
void wgmma_wait() {
    auto& committed = emulator::warpgroup().committed[emulator::machine.current % emulator::WARPGROUP_LANES];
    while (committed.size() > PENDING) {
        for (emulator::Wgmma& one : committed.front()) emulator::perform_wgmma(one);
        committed.pop_front();
    }
}

template <class VALUE>
void settle(VALUE&) {}

template <int SUMS>
void wgmma_s8(int (&d)[SUMS], const unsigned (&a)[4], uint64_t b, bool accumulate) {
    static_assert(SUMS == 64 || SUMS == 128);
    emulator::warpgroup().issued[emulator::machine.current % emulator::WARPGROUP_LANES].push_back(
        {d, {a[0], a[1], a[2], a[3]}, b, accumulate, 2 * SUMS});
}
