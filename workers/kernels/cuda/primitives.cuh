// What kernels ask of the machine: the device front end, inline PTX for sm_80 and later.
//
// Kernel text uses these names only, so that g++ compiles the same text over emulator/primitives.h, which defines
// the same names. Section numbers are those of the PTX ISA, 9.0.
#pragma once

#ifndef BITFRONTIER_EMULATOR

#define DEVICE __device__ __forceinline__

// 16-bit floats as they lie in memory; cuda_fp16.h would be most of the compile time.
struct f16 {
    unsigned short bits;
};
struct bf16 {
    unsigned short bits;
};

// Where a thread is.

DEVICE int thread() { return threadIdx.x; }
DEVICE int lane() { return threadIdx.x & 31; }
DEVICE int warp() { return threadIdx.x >> 5; }
DEVICE int block_x() { return blockIdx.x; }
DEVICE int block_y() { return blockIdx.y; }
DEVICE int blocks_x() { return gridDim.x; }
DEVICE int blocks_y() { return gridDim.y; }

// Shared memory whose size the launch gives, aligned for 128-byte swizzles.
DEVICE unsigned char* dynamic_shared() {
    extern __shared__ __align__(1024) unsigned char bytes[];
    return bytes;
}

DEVICE unsigned shared_address(const void* pointer) {
    return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}

// Order among threads.

DEVICE void barrier() { __syncthreads(); }
DEVICE void warp_barrier() { __syncwarp(); }

// How many CTAs came before this one; the counter returns to 0 after `count` of them, ready for the next launch.
// Memory written before the ticket is seen by whoever takes a later one.
DEVICE unsigned ticket(unsigned* counter, unsigned count) {
    __threadfence();
    unsigned before = atomicInc(counter, count - 1);
    __threadfence();
    return before;
}

// Values of other lanes.

DEVICE unsigned shuffle(unsigned value, int from) { return __shfl_sync(0xFFFFFFFF, value, from); }
DEVICE unsigned shuffle_xor(unsigned value, int mask) { return __shfl_xor_sync(0xFFFFFFFF, value, mask); }

// Loads of memory that no kernel writes meanwhile. Volatile: they stay in their order, ahead of their use.

// Cached: other warps of the multiprocessor want it too.

DEVICE void load_cached16(unsigned* words, const void* from) {
    asm volatile("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];"
        : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
        : "l"(from));
}

DEVICE void load_cached8(unsigned* words, const void* from) {
    asm volatile("ld.global.nc.v2.u32 {%0, %1}, [%2];" : "=r"(words[0]), "=r"(words[1]) : "l"(from));
}

// Streaming: read once, so kept out of L1.

DEVICE void load_streaming16(unsigned* words, const void* from) {
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "l"(from));
}

DEVICE void load_streaming8(unsigned* words, const void* from) {
    asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];" : "=r"(words[0]), "=r"(words[1]) : "l"(from));
}

DEVICE unsigned load_streaming4(const void* from) {
    unsigned word;
    asm volatile("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(word) : "l"(from));
    return word;
}

// From L2, where another CTA has just written.
DEVICE unsigned load_coherent4(const void* from) {
    unsigned word;
    asm volatile("ld.global.cg.u32 %0, [%1];" : "=r"(word) : "l"(from) : "memory");
    return word;
}

// Copies from global to shared memory that complete at a wait (9.7.9.25.3).

DEVICE void copy_async16(void* shared, const void* global) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(shared)), "l"(global) : "memory");
}

DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most `GROUPS` committed groups are still under way.
template <int GROUPS>
DEVICE void copy_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(GROUPS) : "memory");
}

// Four 8×8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8 (9.7.14.5.15).
DEVICE void ldmatrix_x4(unsigned (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// Matrix products d = a·b + c of a warp, a row-major and b column-major in fragments (9.7.14.5). d may be c.

// m16n8k32, int8.
DEVICE void mma_s8(int (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1, const int (&c)[4]) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, "
        "%13};"
        : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3]));
}

// m16n8k64, int4: eight to a word, the first in the lowest bits. Native on sm_80 to sm_89, emulated on sm_90.
DEVICE void mma_s4(int (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1, const int (&c)[4]) {
    asm("mma.sync.aligned.m16n8k64.row.col.s32.s4.s4.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, "
        "%13};"
        : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3]));
}

// m16n8k16, 16-bit floats of the pointed-to type `f16` or `bf16`, summed in float32.
DEVICE void mma_float(f16, float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1, const float (&c)[4]) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, "
        "%12, %13};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
}

DEVICE void mma_float(bf16, float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1, const float (&c)[4]) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, "
        "%12, %13};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
}

// Arithmetic: each one IEEE rounding to nearest even, never contracted.

DEVICE float multiply(float a, float b) { return __fmul_rn(a, b); }
DEVICE float add(float a, float b) { return __fadd_rn(a, b); }
DEVICE float divide(float a, float b) { return __fdiv_rn(a, b); }
DEVICE float fused(float a, float b, float c) { return __fmaf_rn(a, b, c); }
DEVICE float rounded(int value) { return __int2float_rn(value); }
DEVICE int nearest(float value) { return __float2int_rn(value); }

DEVICE unsigned bits_of(float value) { return __float_as_uint(value); }
DEVICE float float_of(unsigned bits) { return __uint_as_float(bits); }

// Two 16-bit floats at once.
DEVICE unsigned add_f16x2(unsigned a, unsigned b) {
    unsigned sum;
    asm("add.rn.f16x2 %0, %1, %2;" : "=r"(sum) : "r"(a), "r"(b));
    return sum;
}

DEVICE unsigned fused_bf16x2(unsigned a, unsigned b, unsigned c) {
    unsigned sum;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(sum) : "r"(a), "r"(b), "r"(c));
    return sum;
}

// Byte i of the result is byte `selector` hex digit i of the eight bytes b:a.
DEVICE unsigned permute(unsigned a, unsigned b, unsigned selector) { return __byte_perm(a, b, selector); }

// Conversions.

DEVICE float to_float(float value) { return value; }

DEVICE float to_float(f16 value) {
    float result;
    asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value.bits));
    return result;
}

DEVICE float to_float(bf16 value) { return __uint_as_float(static_cast<unsigned>(value.bits) << 16); }

DEVICE void assign(float& result, float value) { result = value; }
DEVICE void assign(f16& result, float value) { asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result.bits) : "f"(value)); }
DEVICE void assign(bf16& result, float value) { asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result.bits) : "f"(value)); }

#endif
