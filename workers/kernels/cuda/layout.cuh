// How packed weights lie in memory: the constants of workers/kernels/pack.py, where the layout is described.
#pragma once

#include "primitives.cuh"

constexpr int TILE_ROWS = 16;
constexpr int TILE_INPUTS = 128;
constexpr int CHUNKS = 4;          // of a tile, 32 inputs each: one int8 MMA
constexpr int CHUNK_INPUTS = 32;

DEVICE constexpr int tile_bytes(int bits) { return TILE_ROWS * TILE_INPUTS / 8 * bits; }

DEVICE constexpr int padded_inputs(int inputs) { return (inputs + TILE_INPUTS - 1) / TILE_INPUTS * TILE_INPUTS; }

DEVICE constexpr int padded_rows(int rows) { return (rows + 63) / 64 * 64; }
