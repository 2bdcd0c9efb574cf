// Runs launches of the kernels on the host, block by block.

#include "../kernels.cu"

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <vector>

#include <ucontext.h>

dim3 threadIdx, blockIdx, blockDim, gridDim;

constexpr size_t SHARED_LIMIT = 48 << 10;
// Behind the limit stays room in which writes beyond what was asked for are seen.
alignas(128) unsigned char shared_memory[SHARED_LIMIT + 1024];

namespace emulator {

const Kernel *kernels = nullptr;

namespace {

constexpr size_t STACK = 64 << 10;
constexpr unsigned MOST_THREADS = 1024;
// NaN in every type of the kernels.
constexpr unsigned char POISON = 0xff;

enum class State { Ready, Barrier, Meeting, Done };

const char *running = "";

#if defined(__x86_64__)
// Switching by ucontext asks the kernel for the signal mask each time; this only saves what a
// function must preserve.
extern "C" void emulator_switch(void **from, void *to);
asm(R"(
.text
.local emulator_switch
emulator_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
)");

struct Context {
    void *stack_pointer = nullptr;

    void prepare(unsigned char *stack, void (*entry)()) {
        auto *top = reinterpret_cast<void **>(stack + STACK);
        // The place of a return address, so that the stack is aligned as after a call.
        *--top = nullptr;
        *--top = reinterpret_cast<void *>(entry);
        stack_pointer = top - 6;
        std::memset(stack_pointer, 0, 6 * sizeof(void *));
    }
    void switch_to(Context &other) { emulator_switch(&stack_pointer, other.stack_pointer); }
};
#else
struct Context {
    ucontext_t context;

    void prepare(unsigned char *stack, void (*entry)()) {
        getcontext(&context);
        context.uc_stack.ss_sp = stack;
        context.uc_stack.ss_size = STACK;
        context.uc_link = nullptr;
        makecontext(&context, entry, 0);
    }
    void switch_to(Context &other) { swapcontext(&context, &other.context); }
};
#endif

struct Thread {
    Context context;
    State state = State::Done;
    int line = 0;
    uint64_t brought = 0;
};

Thread threads[MOST_THREADS];
uint64_t met[MOST_THREADS / 32][32];
Context scheduler;
unsigned current = 0;
const Kernel *kernel = nullptr;
void **arguments = nullptr;

void wait(State state, int line) {
    Thread &thread = threads[current];
    thread.state = state;
    thread.line = line;
    thread.context.switch_to(scheduler);
}

void run_thread() {
    kernel->call(arguments);
    wait(State::Done, 0);
    std::abort();
}

// Lets go on the threads from `first` on, if all of them wait in the same way at the same line.
bool release(unsigned first, unsigned count, State state) {
    for (unsigned i = first; i < first + count; i++)
        if (threads[i].state != state || threads[i].line != threads[first].line) return false;
    for (unsigned i = first; i < first + count; i++) {
        if (state == State::Meeting) met[i / 32][i % 32] = threads[i].brought;
        threads[i].state = State::Ready;
    }
    return true;
}

void run_block(unsigned count, unsigned shared_bytes, unsigned char *stacks) {
    std::memset(shared_memory, POISON, sizeof shared_memory);
    for (unsigned i = 0; i < count; i++) {
        threads[i].context.prepare(stacks + i * STACK, run_thread);
        threads[i].state = State::Ready;
    }
    for (;;) {
        unsigned done = 0;
        for (unsigned i = 0; i < count; i++) {
            if (threads[i].state == State::Ready) {
                current = i;
                threadIdx = {i, 0, 0};
                scheduler.switch_to(threads[i].context);
            }
            done += threads[i].state == State::Done;
        }
        if (done == count) break;
        bool released = false;
        for (unsigned first = 0; first < count; first += 32)
            released |= release(first, 32, State::Meeting);
        if (!released && !release(0, count, State::Barrier)) {
            for (unsigned i = 0; i < count; i++)
                std::fprintf(stderr, "%u: state %d, line %d\n", i, int(threads[i].state),
                             threads[i].line);
            fail("threads of block (%u, %u) miss each other", blockIdx.x, blockIdx.y);
        }
    }
    for (size_t i = shared_bytes; i < sizeof shared_memory; i++)
        if (shared_memory[i] != POISON)
            fail("wrote byte %zu of %u of shared memory", i, shared_bytes);
}

} // namespace

void fail(const char *format, ...) {
    va_list values;
    va_start(values, format);
    std::fprintf(stderr, "emulated kernel %s: ", running);
    std::vfprintf(stderr, format, values);
    std::fprintf(stderr, "\n");
    std::abort();
}

void barrier(int line) { wait(State::Barrier, line); }

const uint64_t *meet(int line, uint64_t brought) {
    threads[current].brought = brought;
    wait(State::Meeting, line);
    return met[current / 32];
}

unsigned lane() { return current % 32; }

} // namespace emulator

// Runs a launch. Returns 1 for an unknown kernel; breaches of the device's rules abort.
extern "C" int emulate(const char *name, const unsigned *grid, const unsigned *block,
                       unsigned shared_bytes, void **arguments) {
    using namespace emulator;
    static std::mutex one_at_a_time;
    std::lock_guard<std::mutex> guard(one_at_a_time);
    kernel = kernels;
    while (kernel && std::strcmp(kernel->name, name) != 0) kernel = kernel->next;
    if (!kernel) return 1;
    running = kernel->name;
    emulator::arguments = arguments;
    const unsigned count = block[0];
    if (block[1] != 1 || block[2] != 1 || count == 0 || count % 32 != 0 || count > MOST_THREADS ||
        count > kernel->threads)
        fail("a block of %u x %u x %u threads", block[0], block[1], block[2]);
    if (grid[0] == 0 || grid[1] == 0 || grid[1] > 65535 || grid[0] > 0x7fffffff || grid[2] != 1)
        fail("a grid of %u x %u x %u blocks", grid[0], grid[1], grid[2]);
    if (shared_bytes > SHARED_LIMIT) fail("%u bytes of shared memory", shared_bytes);
    if (kernel->argument_bytes > 4096) fail("%zu bytes of arguments", kernel->argument_bytes);
    static const std::unique_ptr<unsigned char[]> stacks(new unsigned char[STACK * MOST_THREADS]);
    blockDim = {block[0], block[1], block[2]};
    gridDim = {grid[0], grid[1], grid[2]};
    for (unsigned y = 0; y < grid[1]; y++)
        for (unsigned x = 0; x < grid[0]; x++) {
            blockIdx = {x, y, 0};
            run_block(count, shared_bytes, stacks.get());
        }
    return 0;
}
