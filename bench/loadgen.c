/* loadgen: a cheap load generator, so that the server and not the initiator is what gets measured.
 *
 * One thread, one TCP connection, a fixed number of requests in flight, the same send and receive loop
 * for iSCSI (RFC 7143) and NBD, so that servers of both protocols can be compared.  Payload is thrown
 * away as it arrives; writes send bytes out of a fixed random pool, so that they are never zeros.
 *
 *   loadgen iscsi HOST PORT IQN LUN  read|write random|sequential BLOCK DEPTH SECONDS WARMUP SIZE_MIB
 *   loadgen nbd   HOST PORT EXPORT - read|write random|sequential BLOCK DEPTH SECONDS WARMUP SIZE_MIB
 *
 * prints "BEGIN\n" on stderr when the measured interval starts, "END\n" when it ends, and one JSON object
 * on stdout: requests, seconds, client CPU seconds, mean and percentiles of the latency in microseconds.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <endian.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#define BHS 48
#define MAX_DEPTH 256
#define MAX_BLOCK (4u << 20)
#define POOL (MAX_BLOCK * 2)
#define TRASH (1u << 20)
#define MAX_IOV 1000
#define SUB 32 /* latency histogram: 32 steps per power of two, at most 3 % off */
#define BUCKETS (40 * SUB)

struct request {
    uint64_t offset;
    double started;
};

struct state {
    int fd, nbd, write, sequential, lun;
    uint32_t block, depth;
    uint64_t blocks, next_block, seed;
    struct request slots[MAX_DEPTH];
    uint32_t held[MAX_DEPTH], held_count; /* requests that the command window does not admit yet */
    uint32_t cmd_sn, exp_stat_sn, max_cmd_sn;
    uint32_t target_segment, first_burst, max_burst;
    int immediate, initial_r2t;
    uint64_t done, histogram[BUCKETS];
    double latency_sum, worst;
    int measuring;
};

static uint8_t *pool, *trash;
static struct iovec out[MAX_IOV];
static uint8_t headers[MAX_IOV][BHS];
static int out_count;

static void die(const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    fputs("loadgen: ", stderr);
    vfprintf(stderr, format, arguments);
    fputc('\n', stderr);
    va_end(arguments);
    exit(1);
}

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec / 1e9;
}

static double cpu_seconds(void)
{
    struct rusage r;
    getrusage(RUSAGE_SELF, &r);
    return r.ru_utime.tv_sec + r.ru_stime.tv_sec + (r.ru_utime.tv_usec + r.ru_stime.tv_usec) / 1e6;
}

static void put16(uint8_t *p, uint16_t v) { v = htobe16(v); memcpy(p, &v, 2); }
static void put32(uint8_t *p, uint32_t v) { v = htobe32(v); memcpy(p, &v, 4); }
static void put64(uint8_t *p, uint64_t v) { v = htobe64(v); memcpy(p, &v, 8); }
static uint32_t get32(const uint8_t *p) { uint32_t v; memcpy(&v, p, 4); return be32toh(v); }
static uint64_t get64(const uint8_t *p) { uint64_t v; memcpy(&v, p, 8); return be64toh(v); }
static uint32_t segment_length(const uint8_t *h) { return h[5] << 16 | h[6] << 8 | h[7]; }
static void put_segment_length(uint8_t *h, uint32_t n) { h[5] = n >> 16; h[6] = n >> 8; h[7] = n; }

static void send_bytes(int fd, const void *data, size_t length)
{
    const uint8_t *p = data;
    while (length) {
        ssize_t n = send(fd, p, length, MSG_NOSIGNAL);
        if (n <= 0)
            die("send: %m");
        p += n;
        length -= n;
    }
}

static void receive_bytes(int fd, void *data, size_t length)
{
    uint8_t *p = data;
    while (length) {
        ssize_t n = recv(fd, p, length, 0);
        if (n <= 0)
            die("the server closed the connection");
        p += n;
        length -= n;
    }
}

/* --- the output queue: everything that one batch of answers caused goes out in one sendmsg ----------- */

static void flush_out(struct state *s)
{
    int first = 0;
    while (first < out_count) {
        struct msghdr m = {.msg_iov = out + first, .msg_iovlen = out_count - first};
        ssize_t n = sendmsg(s->fd, &m, MSG_NOSIGNAL);
        if (n <= 0)
            die("sendmsg: %m");
        while (first < out_count && (size_t)n >= out[first].iov_len)
            n -= out[first++].iov_len;
        if (first < out_count) {
            out[first].iov_base = (uint8_t *)out[first].iov_base + n;
            out[first].iov_len -= n;
        }
    }
    out_count = 0;
}

static uint8_t *queue_header(struct state *s, size_t length)
{
    if (out_count + 2 > MAX_IOV)
        flush_out(s);
    uint8_t *h = headers[out_count];
    memset(h, 0, length);
    out[out_count++] = (struct iovec){h, length};
    return h;
}

static void queue_payload(uint32_t slot, uint32_t offset, uint32_t length)
{
    if (length)
        out[out_count++] = (struct iovec){pool + slot * 4096 % MAX_BLOCK + offset, length};
}

/* --- iSCSI --------------------------------------------------------------------------------------- */

static uint32_t min32(uint32_t a, uint32_t b) { return a < b ? a : b; }

static void data_out(struct state *s, uint32_t slot, uint32_t ttt, uint32_t offset, uint32_t length)
{
    uint32_t sn = 0;
    while (length) {
        uint32_t n = min32(length, s->target_segment);
        uint8_t *h = queue_header(s, BHS);
        h[0] = 0x05;
        h[1] = n == length ? 0x80 : 0;
        put_segment_length(h, n);
        h[9] = s->lun;
        put32(h + 16, slot + 1);
        put32(h + 20, ttt);
        put32(h + 28, s->exp_stat_sn);
        put32(h + 36, sn++);
        put32(h + 40, offset);
        queue_payload(slot, offset, n);
        offset += n;
        length -= n;
    }
}

static void iscsi_command(struct state *s, uint32_t slot)
{
    uint32_t immediate = 0, unsolicited = 0;
    if (s->write) {
        if (s->immediate)
            immediate = min32(s->block, min32(s->first_burst, s->target_segment));
        if (!s->initial_r2t)
            unsolicited = min32(s->block, s->first_burst) - immediate;
    }
    uint8_t *h = queue_header(s, BHS);
    h[0] = 0x01;
    h[1] = (unsolicited ? 0 : 0x80) | (s->write ? 0x20 : 0x40) | 1;
    put_segment_length(h, immediate);
    h[9] = s->lun;
    put32(h + 16, slot + 1);
    put32(h + 20, s->block);
    put32(h + 24, s->cmd_sn++);
    put32(h + 28, s->exp_stat_sn);
    h[32] = s->write ? 0x8a : 0x88;
    put64(h + 34, s->slots[slot].offset / 512);
    put32(h + 42, s->block / 512);
    queue_payload(slot, 0, immediate);
    if (unsolicited)
        data_out(s, slot, 0xffffffff, immediate, unsolicited);
}

static void nbd_command(struct state *s, uint32_t slot)
{
    uint8_t *h = queue_header(s, 28);
    put32(h, 0x25609513);
    put16(h + 6, s->write ? 1 : 0);
    put64(h + 8, slot + 1);
    put64(h + 16, s->slots[slot].offset);
    put32(h + 24, s->block);
    if (s->write)
        queue_payload(slot, 0, s->block);
}

static int window_open(const struct state *s)
{
    return s->nbd || (int32_t)(s->max_cmd_sn - s->cmd_sn) >= 0;
}

static void issue(struct state *s, uint32_t slot)
{
    if (!window_open(s)) {
        s->held[s->held_count++] = slot;
        return;
    }
    uint64_t block;
    if (s->sequential) {
        block = s->next_block++ % s->blocks;
    } else {
        s->seed ^= s->seed << 13;
        s->seed ^= s->seed >> 7;
        s->seed ^= s->seed << 17;
        block = s->seed % s->blocks;
    }
    s->slots[slot].offset = block * s->block;
    s->slots[slot].started = now();
    if (s->nbd)
        nbd_command(s, slot);
    else
        iscsi_command(s, slot);
}

static int bucket_of(double microseconds)
{
    double v = microseconds < 1 ? 1 : microseconds;
    int power = 0;
    while (v >= 2 && power < 39) {
        v /= 2;
        power++;
    }
    int index = power * SUB + (int)((v - 1) * SUB);
    return index < BUCKETS ? index : BUCKETS - 1;
}

static void completed(struct state *s, uint32_t slot)
{
    if (slot >= s->depth)
        die("an answer with the unknown tag %u", slot + 1);
    if (s->measuring) {
        double us = (now() - s->slots[slot].started) * 1e6;
        s->done++;
        s->latency_sum += us;
        s->histogram[bucket_of(us)]++;
        if (us > s->worst)
            s->worst = us;
    }
    issue(s, slot);
}

static void nop_answer(struct state *s, const uint8_t *ping)
{
    uint8_t *h = queue_header(s, BHS);
    h[0] = 0x40;
    h[1] = 0x80;
    memcpy(h + 8, ping + 8, 8);
    put32(h + 16, 0xffffffff);
    memcpy(h + 20, ping + 20, 4);
    put32(h + 24, s->cmd_sn);
    put32(h + 28, s->exp_stat_sn);
}

/* One header has arrived; returns the number of payload bytes that follow it. */
static uint32_t iscsi_answer(struct state *s, const uint8_t *h)
{
    int opcode = h[0] & 0x3f, ended = 0;
    switch (opcode) {
    case 0x25: /* SCSI Data-In, with the status in the last PDU of a read if the target collapses phases */
        ended = h[1] & 1;
        break;
    case 0x21: /* SCSI Response */
        ended = 1;
        break;
    case 0x31: /* R2T */
        data_out(s, get32(h + 16) - 1, get32(h + 20), get32(h + 40), get32(h + 44));
        break;
    case 0x20: /* NOP-In */
        if (get32(h + 20) != 0xffffffff)
            nop_answer(s, h);
        break;
    default:
        die("unexpected PDU with opcode 0x%02x", opcode);
    }
    uint32_t window = get32(h + 32);
    if ((int32_t)(window - s->max_cmd_sn) > 0)
        s->max_cmd_sn = window;
    if (ended) {
        if (h[3])
            die("SCSI status 0x%02x", h[3]);
        s->exp_stat_sn = get32(h + 24) + 1;
        completed(s, get32(h + 16) - 1);
    }
    while (s->held_count && window_open(s))
        issue(s, s->held[--s->held_count]);
    return (segment_length(h) + 3) & ~3u;
}

static uint32_t nbd_answer(struct state *s, const uint8_t *h)
{
    if (get32(h) != 0x67446698)
        die("bad magic in an NBD reply");
    if (get32(h + 4))
        die("NBD error %u", get32(h + 4));
    completed(s, get64(h + 8) - 1);
    return s->write ? 0 : s->block;
}

/* --- connecting ---------------------------------------------------------------------------------- */

static int dial(const char *host, int port)
{
    int fd = socket(AF_INET, SOCK_STREAM, 0), one = 1;
    struct sockaddr_in a = {.sin_family = AF_INET, .sin_port = htons(port)};
    if (inet_pton(AF_INET, host, &a.sin_addr) != 1)
        die("%s is not an IPv4 address", host);
    if (connect(fd, (void *)&a, sizeof a))
        die("connect to %s:%d: %m", host, port);
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    return fd;
}

static void take_key(struct state *s, const char *text)
{
    const char *value = strchr(text, '=');
    if (!value++)
        return;
#define KEY(name) (!strncmp(text, name "=", sizeof name))
    if (KEY("MaxRecvDataSegmentLength"))
        s->target_segment = strtoul(value, 0, 10);
    else if (KEY("FirstBurstLength"))
        s->first_burst = strtoul(value, 0, 10);
    else if (KEY("MaxBurstLength"))
        s->max_burst = strtoul(value, 0, 10);
    else if (KEY("ImmediateData"))
        s->immediate = !strcmp(value, "Yes");
    else if (KEY("InitialR2T"))
        s->initial_r2t = !strcmp(value, "Yes");
#undef KEY
}

static int add_key(char *text, int length, const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    int n = vsprintf(text + length, format, arguments);
    va_end(arguments);
    return length + n + 1;
}

static int login_exchange(struct state *s, int flags, char *text, int length)
{
    uint8_t h[BHS] = {0x43, flags};
    put_segment_length(h, length);
    h[8] = 0x80; /* ISID: random format */
    put16(h + 10, getpid());
    put32(h + 16, 1);
    put32(h + 24, s->cmd_sn);
    put32(h + 28, s->exp_stat_sn);
    send_bytes(s->fd, h, BHS);
    while (length & 3)
        text[length++] = 0;
    send_bytes(s->fd, text, length);
    receive_bytes(s->fd, h, BHS);
    if ((h[0] & 0x3f) != 0x23)
        die("the answer to a login has opcode 0x%02x", h[0]);
    uint32_t n = segment_length(h);
    char answer[16384];
    if (n + 3 > sizeof answer)
        die("a login answer of %u bytes", n);
    receive_bytes(s->fd, answer, (n + 3) & ~3u);
    if (h[36])
        die("login refused with status %02x%02x", h[36], h[37]);
    s->exp_stat_sn = get32(h + 24) + 1;
    s->max_cmd_sn = get32(h + 32);
    for (uint32_t i = 0; i < n; i += strlen(answer + i) + 1)
        take_key(s, answer + i);
    return h[1];
}

static void test_unit_ready(struct state *s)
{
    for (int attempt = 0; attempt < 8; attempt++) {
        uint8_t h[BHS] = {0x01, 0x81};
        h[9] = s->lun;
        put32(h + 16, 1);
        put32(h + 24, s->cmd_sn++);
        put32(h + 28, s->exp_stat_sn);
        send_bytes(s->fd, h, BHS);
        do {
            receive_bytes(s->fd, h, BHS);
            receive_bytes(s->fd, trash, (segment_length(h) + 3) & ~3u);
        } while ((h[0] & 0x3f) != 0x21);
        s->exp_stat_sn = get32(h + 24) + 1;
        s->max_cmd_sn = get32(h + 32);
        if (!h[3])
            return;
    }
    die("the logical unit does not become ready");
}

static void iscsi_login(struct state *s, const char *iqn)
{
    char text[2048];
    s->cmd_sn = 1;
    s->target_segment = 8192;
    s->first_burst = 65536;
    s->max_burst = 262144;
    s->initial_r2t = 1;
    s->immediate = 1;
    int n = add_key(text, 0, "InitiatorName=iqn.2026-01.org.ploopd:loadgen");
    n = add_key(text, n, "TargetName=%s", iqn);
    n = add_key(text, n, "SessionType=Normal");
    n = add_key(text, n, "AuthMethod=None");
    int flags = login_exchange(s, 0x81, text, n);
    static const char *const keys[] = {
        "HeaderDigest=None", "DataDigest=None", "InitialR2T=No", "ImmediateData=Yes",
        "MaxRecvDataSegmentLength=262144", "MaxBurstLength=262144", "FirstBurstLength=262144",
        "MaxConnections=1", "MaxOutstandingR2T=1", "DefaultTime2Wait=2", "DefaultTime2Retain=0",
        "ErrorRecoveryLevel=0", "DataPDUInOrder=Yes", "DataSequenceInOrder=Yes"};
    n = 0;
    for (size_t i = 0; i < sizeof keys / sizeof *keys; i++)
        n = add_key(text, n, "%s", keys[i]);
    flags = login_exchange(s, 0x87, text, n);
    for (int i = 0; !(flags & 0x80) && i < 8; i++)
        flags = login_exchange(s, 0x87, text, 0);
    test_unit_ready(s);
}

static void nbd_login(struct state *s, const char *export_name)
{
    uint8_t b[4096];
    receive_bytes(s->fd, b, 18);
    if (get64(b + 8) != 0x49484156454f5054ull)
        die("not an NBD newstyle server");
    put32(b, 1); /* fixed newstyle */
    send_bytes(s->fd, b, 4);
    uint32_t length = strlen(export_name);
    put64(b, 0x49484156454f5054ull);
    put32(b + 8, 7); /* NBD_OPT_GO */
    put32(b + 12, 4 + length + 2);
    put32(b + 16, length);
    memcpy(b + 20, export_name, length);
    put16(b + 20 + length, 0);
    send_bytes(s->fd, b, 22 + length);
    for (;;) {
        receive_bytes(s->fd, b, 20);
        uint32_t type = get32(b + 12), n = get32(b + 16);
        if (n > sizeof b)
            die("an NBD option reply of %u bytes", n);
        receive_bytes(s->fd, b, n);
        if (type == 1) /* NBD_REP_ACK */
            return;
        if (type & 0x80000000u)
            die("NBD refuses the export: 0x%x", type);
    }
}

/* --- the loop ------------------------------------------------------------------------------------ */

static void receive_batch(struct state *s)
{
    static uint8_t header[BHS];
    static uint32_t have, skip;
    uint32_t header_size = s->nbd ? 16 : BHS;
    ssize_t n = recv(s->fd, trash, TRASH, 0);
    if (n <= 0)
        die("the server closed the connection");
    const uint8_t *p = trash, *end = trash + n;
    while (p < end) {
        if (skip) {
            uint32_t m = min32(skip, end - p);
            skip -= m;
            p += m;
            continue;
        }
        uint32_t m = min32(header_size - have, end - p);
        memcpy(header + have, p, m);
        have += m;
        p += m;
        if (have == header_size) {
            have = 0;
            skip = s->nbd ? nbd_answer(s, header) : iscsi_answer(s, header);
        }
    }
    flush_out(s);
}

static double percentile(const struct state *s, double share)
{
    uint64_t wanted = s->done * share, seen = 0;
    for (int i = 0; i < BUCKETS; i++) {
        seen += s->histogram[i];
        if (seen > wanted)
            return (double)(1ull << (i / SUB)) * (1 + (i % SUB + 0.5) / SUB);
    }
    return s->worst;
}

static void run(struct state *s, double seconds, double warmup)
{
    for (uint32_t i = 0; i < s->depth; i++)
        issue(s, i);
    flush_out(s);
    double begin = now();
    while (now() - begin < warmup)
        receive_batch(s);
    s->measuring = 1;
    fputs("BEGIN\n", stderr);
    double cpu = cpu_seconds(), end;
    begin = now();
    do {
        receive_batch(s);
        end = now();
    } while (end - begin < seconds);
    fputs("END\n", stderr);
    cpu = cpu_seconds() - cpu;
    double elapsed = end - begin;
    if (!s->done)
        die("no request was answered in %.1f s", elapsed);
    printf("{\"requests\":%llu,\"seconds\":%.4f,\"iops\":%.1f,\"bytes_per_second\":%.0f,\"client_cpu_seconds\":%.4f,"
           "\"latency_us\":{\"mean\":%.1f,\"p50\":%.1f,\"p99\":%.1f,\"p999\":%.1f,\"max\":%.1f}}\n",
           (unsigned long long)s->done, elapsed, s->done / elapsed, s->done * (double)s->block / elapsed, cpu,
           s->latency_sum / s->done, percentile(s, 0.5), percentile(s, 0.99), percentile(s, 0.999), s->worst);
}

int main(int argc, char **argv)
{
    if (argc != 13)
        die("usage: loadgen iscsi|nbd HOST PORT IQN|EXPORT LUN read|write random|sequential BLOCK DEPTH SECONDS WARMUP SIZE_MIB");
    static struct state s;
    s.nbd = !strcmp(argv[1], "nbd");
    s.lun = atoi(argv[5]);
    s.write = !strcmp(argv[6], "write");
    s.sequential = !strcmp(argv[7], "sequential");
    s.block = atoi(argv[8]);
    s.depth = atoi(argv[9]);
    if (!s.block || s.block % 512 || s.block > MAX_BLOCK || !s.depth || s.depth > MAX_DEPTH)
        die("a block of 512 to %u bytes and a depth of 1 to %u", MAX_BLOCK, MAX_DEPTH);
    s.blocks = strtoull(argv[12], 0, 10) * 1048576 / s.block;
    if (!s.blocks)
        die("the disk is smaller than one block");
    s.seed = 88172645463325252ull ^ (uint64_t)(now() * 1e9);
    pool = malloc(POOL);
    trash = malloc(TRASH);
    uint64_t x = s.seed;
    for (size_t i = 0; i < POOL / 8; i++) {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        memcpy(pool + i * 8, &x, 8);
    }
    s.fd = dial(argv[2], atoi(argv[3]));
    if (s.nbd)
        nbd_login(&s, argv[4]);
    else
        iscsi_login(&s, argv[4]);
    run(&s, atof(argv[10]), atof(argv[11]));
    return 0;
}
