// Hopper's own instructions (sm_90a): mbarriers, bulk copies, warpgroup MMA, registers moved between warps.
// PTX ISA 8.0, sections "mbarrier", "cp.async.bulk", "Asynchronous Warpgroup Level Matrix Instructions".
// The emulator has the same functions in emulator/hopper.h.
#pragma once

#include "primitives.cuh"

#ifndef BITFRONTIER_EMULATOR

// A barrier in shared memory that counts arrivals and bytes; its phase flips when both are complete.
struct MBarrier {
    unsigned long long state;
};

DEVICE void mbarrier_init(MBarrier* barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals));
}

// Makes initialised barriers visible to the copy engine; a CTA barrier must follow.
DEVICE void mbarrier_init_fence() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

DEVICE void mbarrier_arrive(MBarrier* barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// Arrive, and let the phase wait for so many copied bytes.
DEVICE void mbarrier_arrive_expect(MBarrier* barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
                 : "memory");
}

// Wait until the phase of this parity is complete; a fresh barrier's phase of parity 1 is.
DEVICE void mbarrier_wait(MBarrier* barrier, int parity) {
    asm volatile(
        "{\n"
        ".reg .pred complete;\n"
        "retry:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 complete, [%0], %1;\n"
        "@!complete bra retry;\n"
        "}\n" ::"r"(shared_address(barrier)),
        "r"(parity)
        : "memory");
}

// Copy contiguous bytes (a multiple of 16, both ends aligned to 16) to shared memory; the barrier counts them.
DEVICE void copy_bulk(void* shared, const void* global, int bytes, MBarrier* barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     shared_address(shared)),
                 "l"(global), "r"(bytes), "r"(shared_address(barrier))
                 : "memory");
}

// All warps of a warpgroup together. Takes effect only under __launch_bounds__(threads, 1).
template <int REGISTERS>
DEVICE void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

template <int REGISTERS>
DEVICE void give_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

// Orders writes to registers before the wgmma that read them.
DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Wait until at most `PENDING` of the committed groups are unfinished.
template <int PENDING>
DEVICE void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// The compiler moves no computation of these registers past here: wgmma reads and writes them unseen.
DEVICE void settle(int& value) { asm volatile("" : "+r"(value)::"memory"); }
DEVICE void settle(unsigned& value) { asm volatile("" : "+r"(value)::"memory"); }

template <class VALUE, int COUNT>
DEVICE void settle(VALUE (&values)[COUNT]) {
#pragma unroll
    for (VALUE& value : values) settle(value);
}

// d (+)= A·B of 64 × 32 by 32 × 128 or 256: warp w of the warpgroup holds rows 16·w … 16·w + 15 of A and d, laid out as
// those of mma.m16n8k32. Without `accumulate` d is overwritten. Asynchronous: touch neither d nor a before wgmma_wait.
#define D4(d, i) "+r"(d[i]), "+r"(d[i + 1]), "+r"(d[i + 2]), "+r"(d[i + 3])
#define D16(d, i) D4(d, i), D4(d, i + 4), D4(d, i + 8), D4(d, i + 12)

DEVICE void wgmma_s8(int (&d)[64], const unsigned (&a)[4], unsigned long long b, bool accumulate) {
    asm volatile(
        "{\n"
        ".reg .pred accumulate;\n"
        "setp.ne.b32 accumulate, %69, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
        "{%64, %65, %66, %67}, %68, accumulate;\n"
        "}\n"
        : D16(d, 0), D16(d, 16), D16(d, 32), D16(d, 48)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"((int)accumulate));
}

DEVICE void wgmma_s8(int (&d)[128], const unsigned (&a)[4], unsigned long long b, bool accumulate) {
    asm volatile(
        "{\n"
        ".reg .pred accumulate;\n"
        "setp.ne.b32 accumulate, %133, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n256k32.s32.s8.s8 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "
        "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "
        "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "
        "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "
        "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127}, "
        "{%128, %129, %130, %131}, %132, accumulate;\n"
        "}\n"
        : D16(d, 0), D16(d, 16), D16(d, 32), D16(d, 48), D16(d, 64), D16(d, 80), D16(d, 96), D16(d, 112)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"((int)accumulate));
}

#undef D16
#undef D4

#endif

// The matrix descriptor of B in shared memory, K-major in atoms of 8 columns × 128 bytes with the 128-byte swizzle:
// address / 16 in bits 0–13, bytes between atoms / 16 in bits 32–45, the swizzle in bits 62–63. The leading
// offset (bits 16–29) has no meaning here. Atoms are aligned to 1024 bytes; a step of 32 bytes along K adds 2.
DEVICE unsigned long long wgmma_descriptor(const void* shared) {
    return (unsigned long long)((shared_address(shared) & 0x3FFFF) >> 4) | 1ull << 16 | 1024ull >> 4 << 32 | 1ull << 62;
}
