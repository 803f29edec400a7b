// A CTA on one core: its threads are fibers that run until they wait for one another.
//
// `launch` runs the CTAs of a grid one after the other. A fiber waits by naming a counter: it goes on once the counter
// has changed. If every fiber waits and none can go on, the launch fails, as a GPU would hang.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

namespace emulator {

constexpr int LANES = 32;
constexpr int STACK_BYTES = 1 << 16;
constexpr int SHARED_BYTES = 227 * 1024;
constexpr unsigned char UNWRITTEN = 0xCD;

struct Copy {
    void* to;
    const void* from;
    int bytes;
};

struct Fiber {
    ucontext_t start;
    jmp_buf resume;
    std::vector<char> stack;
    bool started = false;
    bool finished = false;
    const unsigned* watched = nullptr;
    unsigned seen = 0;
    // Of cp.async: not yet committed, and the committed groups that no wait has completed.
    std::vector<Copy> copies;
    std::vector<std::vector<Copy>> committed;
};

// Where fibers meet: the last to arrive lets all go on.
struct Meeting {
    int arrived = 0;
    unsigned generation = 0;
};

struct Warp {
    Meeting meeting;
    const void* operation = nullptr;
    void* operands[LANES];
};

struct Machine {
    jmp_buf scheduler;
    std::vector<Fiber> fibers;
    std::vector<Warp> warps;
    Meeting barrier;
    int threads = 0;
    int current = 0;
    int block_x = 0, block_y = 0, blocks_x = 0, blocks_y = 0;
    void (*body)(void*) = nullptr;
    void* arguments = nullptr;
    std::string error;
};

inline Machine machine;
alignas(1024) inline unsigned char shared_memory[SHARED_BYTES];

inline Fiber& fiber() { return machine.fibers[machine.current]; }

[[noreturn]] inline void to_scheduler() { _longjmp(machine.scheduler, 1); }

[[noreturn]] inline void fail(const std::string& what) {
    machine.error = what + " (thread " + std::to_string(machine.current) + " of CTA " +
                    std::to_string(machine.block_x) + ", " + std::to_string(machine.block_y) + ")";
    to_scheduler();
}

// Let the others run until `counter` is no longer `seen`.
inline void wait_while(const unsigned& counter, unsigned seen) {
    while (counter == seen) {
        fiber().watched = &counter;
        fiber().seen = seen;
        if (!_setjmp(fiber().resume)) to_scheduler();
    }
}

// Wait for `expected` threads; `last` is done by the one that completes them.
template <class Last>
void meet(Meeting& meeting, int expected, Last last) {
    const unsigned generation = meeting.generation;
    if (++meeting.arrived < expected) return wait_while(meeting.generation, generation);
    last();
    meeting.arrived = 0;
    ++meeting.generation;
}

// An instruction of a whole warp: `operation` is done once, on the operands of all lanes.
template <class Operand, class Operation>
void collective(Operand& operand, Operation operation) {
    static const char name = 0;
    Warp& warp = machine.warps[machine.current / LANES];
    if (warp.meeting.arrived == 0) warp.operation = &name;
    if (warp.operation != &name) fail("lanes of a warp are at different instructions");
    warp.operands[machine.current % LANES] = &operand;
    meet(warp.meeting, LANES, [&] { operation(reinterpret_cast<Operand**>(warp.operands)); });
}

inline void begin() {
    machine.body(machine.arguments);
    fiber().finished = true;
    to_scheduler();
}

inline void run(int index) {
    Fiber& chosen = machine.fibers[index];
    machine.current = index;
    if (_setjmp(machine.scheduler)) return;
    if (chosen.started) _longjmp(chosen.resume, 1);
    chosen.started = true;
    getcontext(&chosen.start);
    chosen.start.uc_stack.ss_sp = chosen.stack.data();
    chosen.start.uc_stack.ss_size = chosen.stack.size();
    makecontext(&chosen.start, begin, 0);
    setcontext(&chosen.start);
}

inline bool can_run(const Fiber& fiber) {
    return !fiber.finished && (fiber.watched == nullptr || *fiber.watched != fiber.seen);
}

inline void check_shared(int bytes) {
    const auto written = [](unsigned char byte) { return byte != UNWRITTEN; };
    if (std::any_of(shared_memory + bytes, shared_memory + SHARED_BYTES, written))
        machine.error = "writes behind its shared memory";
}

inline void run_block(bool reverse) {
    for (Fiber& fiber : machine.fibers) {
        std::vector<char> stack = std::move(fiber.stack);
        fiber = Fiber();
        fiber.stack = std::move(stack);
    }
    machine.warps.assign((machine.threads + LANES - 1) / LANES, Warp());
    machine.barrier = Meeting();
    std::memset(shared_memory, UNWRITTEN, SHARED_BYTES);
    for (int left = machine.threads; left > 0;) {
        bool progress = false;
        for (int turn = 0; turn < machine.threads; ++turn) {
            const int index = reverse ? machine.threads - 1 - turn : turn;
            if (!can_run(machine.fibers[index])) continue;
            run(index);
            if (!machine.error.empty()) return;
            progress = true;
            left -= machine.fibers[index].finished;
        }
        if (!progress) {
            machine.error = "every thread waits for another";
            return;
        }
    }
}

struct Grid {
    int32_t blocks_x, blocks_y, threads;
    int32_t shared_bytes;
    int32_t reverse;  // whether CTAs, and the threads of each, run from the last to the first
    int32_t arguments;
};

template <class Value>
Value argument(uint64_t bits) {
    if constexpr (std::is_pointer_v<Value>)
        return reinterpret_cast<Value>(bits);
    else
        return static_cast<Value>(bits);
}

template <class... Parameters, std::size_t... I>
const char* launch(void (*kernel)(Parameters...), const Grid& grid, const uint64_t* values, std::index_sequence<I...>) {
    auto body = [&] { kernel(argument<Parameters>(values[I])...); };
    machine.body = [](void* pointer) { (*static_cast<decltype(body)*>(pointer))(); };
    machine.arguments = &body;
    machine.threads = grid.threads;
    machine.blocks_x = grid.blocks_x;
    machine.blocks_y = grid.blocks_y;
    machine.error.clear();
    machine.fibers.resize(grid.threads);
    for (Fiber& fiber : machine.fibers) fiber.stack.resize(STACK_BYTES);
    if (grid.arguments != sizeof...(Parameters)) machine.error = "takes another number of arguments";
    const int blocks = grid.blocks_x * grid.blocks_y;
    for (int turn = 0; turn < blocks && machine.error.empty(); ++turn) {
        const int block = grid.reverse ? blocks - 1 - turn : turn;
        machine.block_x = block % grid.blocks_x;
        machine.block_y = block / grid.blocks_x;
        run_block(grid.reverse);
        if (machine.error.empty()) check_shared(grid.shared_bytes);
    }
    return machine.error.empty() ? nullptr : machine.error.c_str();
}

// Run a kernel on every thread of a grid; nullptr, or what went wrong. An integer or a pointer is 64 bits of `values`.
template <class... Parameters>
const char* launch(void (*kernel)(Parameters...), const Grid& grid, const uint64_t* values) {
    return launch(kernel, grid, values, std::index_sequence_for<Parameters...>());
}

}  // namespace emulator
