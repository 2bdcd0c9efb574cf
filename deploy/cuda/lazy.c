// A library of NVIDIA's that is looked for when it is first called, so that a program linked with it
// starts on machines that do not have it. Where it is missing, or lacks a function, the call returns
// the library's own error FAILURE. For x86-64.
//
//   gcc -c -fPIC -O2 -DLIB=cublas -DSONAME='"libcublas.so.13"' -DFAILURE=1 -DENTRIES='"names.h"' lazy.c
//
// ENTRIES holds a line `ENTRY(i, name)` for each function, numbered from 0.
#include <dlfcn.h>
#include <pthread.h>
#include <stddef.h>

#define TEXT_OF(x) #x
#define TEXT(x) TEXT_OF(x)
#define JOIN_OF(a, b, c) a##b##c
#define JOIN(a, b, c) JOIN_OF(a, b, c)
#define TABLE "lazy_" TEXT(LIB) "_table"
#define LOAD "lazy_" TEXT(LIB) "_load"
#define RESOLVE "lazy_" TEXT(LIB) "_resolve"

#define ENTRY(i, name) #name,
static const char *const names[] = {
#include ENTRIES
};
#undef ENTRY

// Where each function is; null until it is first called.
__attribute__((visibility("hidden"), used))
void *JOIN(lazy_, LIB, _table)[sizeof names / sizeof *names];

static void *library;
static pthread_once_t opened = PTHREAD_ONCE_INIT;

static void open_library(void) { library = dlopen(SONAME, RTLD_NOW | RTLD_GLOBAL); }

static int missing(void) { return FAILURE; }

__attribute__((visibility("hidden"), used))
void *JOIN(lazy_, LIB, _load)(size_t i) {
  pthread_once(&opened, open_library);
  void *function = library ? dlsym(library, names[i]) : NULL;
  if (!function) function = (void *)missing;
  __atomic_store_n(&JOIN(lazy_, LIB, _table)[i], function, __ATOMIC_RELEASE);
  return function;
}

// %r11 holds the function's number; the caller's arguments go on to it as they came.
__asm__(
  ".section .text." RESOLVE ",\"ax\",@progbits\n"
  ".type " RESOLVE ",@function\n"
  RESOLVE ":\n"
  "  pushq %rdi\n  pushq %rsi\n  pushq %rdx\n  pushq %rcx\n  pushq %r8\n  pushq %r9\n  pushq %r11\n"
  "  subq $128, %rsp\n"
  "  movups %xmm0, (%rsp)\n  movups %xmm1, 16(%rsp)\n  movups %xmm2, 32(%rsp)\n"
  "  movups %xmm3, 48(%rsp)\n  movups %xmm4, 64(%rsp)\n  movups %xmm5, 80(%rsp)\n"
  "  movups %xmm6, 96(%rsp)\n  movups %xmm7, 112(%rsp)\n"
  "  movq %r11, %rdi\n"
  "  call " LOAD "\n"
  "  movq %rax, 128(%rsp)\n"
  "  movups (%rsp), %xmm0\n  movups 16(%rsp), %xmm1\n  movups 32(%rsp), %xmm2\n"
  "  movups 48(%rsp), %xmm3\n  movups 64(%rsp), %xmm4\n  movups 80(%rsp), %xmm5\n"
  "  movups 96(%rsp), %xmm6\n  movups 112(%rsp), %xmm7\n"
  "  addq $128, %rsp\n"
  "  popq %r11\n  popq %r9\n  popq %r8\n  popq %rcx\n  popq %rdx\n  popq %rsi\n  popq %rdi\n"
  "  jmp *%r11\n");

// Each function in a section of its own: the linker keeps those that are called.
#define ENTRY(i, name) __asm__( \
  ".section .text." #name ",\"ax\",@progbits\n" \
  ".globl " #name "\n.type " #name ",@function\n" \
  #name ":\n" \
  "  endbr64\n" \
  "  movq " TABLE "+8*" #i "(%rip), %r11\n" \
  "  testq %r11, %r11\n" \
  "  jz 1f\n" \
  "  jmp *%r11\n" \
  "1: movl $" #i ", %r11d\n" \
  "  jmp " RESOLVE "\n");
#include ENTRIES
