/* Preloaded into user-mode-linux on CPUs whose saved register state is larger than it knows.
 *
 * UML up to 6.1 reserves 2696 bytes for the extended state of a process (arch/x86/um/user-offsets.c:
 * HOST_FP_SIZE).  A CPU with AMX has 11008; there the host refuses a PTRACE_SETREGSET of only a part
 * with EFAULT, and the guest panics before it starts.  The part that UML keeps ends after the AVX-512
 * registers, so it is enough to hand the rest over as "never used".
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <elf.h>
#include <stdarg.h>
#include <stdint.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/uio.h>

#define XSTATE_BV 512 /* Intel SDM 13.4.2: the header's bit map of the components in use */
#define AMX (3ull << 17)

static long (*next)(int, int, void *, void *);
static uint8_t whole[65536]; /* static: UML's kernel stacks are small, and it has one thread */
static size_t whole_size;

static long set_registers(int pid, void *type, struct iovec *given)
{
    if (!whole_size) {
        struct iovec all = {whole, sizeof whole};
        if (next(PTRACE_GETREGSET, pid, type, &all))
            return -1;
        whole_size = all.iov_len;
    }
    if (given->iov_len >= whole_size)
        return next(PTRACE_SETREGSET, pid, type, given);
    uint64_t used;
    memset(whole, 0, whole_size);
    memcpy(whole, given->iov_base, given->iov_len);
    memcpy(&used, whole + XSTATE_BV, sizeof used);
    used &= ~AMX;
    memcpy(whole + XSTATE_BV, &used, sizeof used);
    struct iovec all = {whole, whole_size};
    return next(PTRACE_SETREGSET, pid, type, &all);
}

long ptrace(enum __ptrace_request request, ...)
{
    va_list arguments;
    va_start(arguments, request);
    int pid = va_arg(arguments, int);
    void *address = va_arg(arguments, void *);
    void *data = va_arg(arguments, void *);
    va_end(arguments);
    if (!next)
        next = (long (*)(int, int, void *, void *))dlsym(RTLD_NEXT, "ptrace");
    if (request == PTRACE_SETREGSET && address == (void *)NT_X86_XSTATE)
        return set_registers(pid, address, data);
    return next(request, pid, address, data);
}
