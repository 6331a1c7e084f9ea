#!/bin/bash
# run.sh [-m MEM] [-s SCRATCH] [-t TIMEOUT_S] [-o OUT] [-i systemd] -- CMD [ARGS...]
#
# Run CMD as root in a user-mode-linux guest whose root is this machine's root file system (hostfs,
# read-only) under a throwaway tmpfs overlay: the checkout, the venv and the interpreter have the same
# paths in the guest, and everything the guest writes is gone afterwards.  /scratch in the guest is a
# real ext4 (O_DIRECT, fallocate, hole punching) on a sparse file, /out is OUT of the host.
# With -i systemd process 1 is systemd, and CMD one of its services.
# Needs no privileges and no network.  Exit status: CMD's; 124 on time-out; 125 when there is no guest;
# 126 when it died.
set -u
MEM=2G SCRATCH=4G TIMEOUT=170 OUT= INIT=
while [ $# -gt 0 ]; do
    case $1 in
    -m) MEM=$2; shift 2 ;;
    -s) SCRATCH=$2; shift 2 ;;
    -t) TIMEOUT=$2; shift 2 ;;
    -o) OUT=$2; shift 2 ;;
    -i) INIT=$2; shift 2 ;;
    --) shift; break ;;
    *) break ;;
    esac
done
HERE=$(cd "$(dirname "$0")" && pwd)
PATH=$PATH:/usr/sbin:/sbin
missing=
LINUX=${LINUX_UML:-$(command -v linux.uml)} || missing="$missing user-mode-linux"
MODULES=${UML_MODULES:-/usr/lib/uml/modules}
[ -d "$MODULES" ] || missing="$missing user-mode-linux"
command -v mkfs.ext4 >/dev/null || missing="$missing e2fsprogs"
command -v iscsid >/dev/null || missing="$missing open-iscsi"
command -v modprobe >/dev/null || missing="$missing kmod"
[ "$INIT" != systemd ] || [ -x /lib/systemd/systemd ] || missing="$missing systemd"
if [ -n "$missing" ]; then
    echo "run.sh: no guest here: apt-get install$missing" >&2
    exit 125
fi
RUN=$(mktemp -d "${TMPDIR:-/tmp}/ploopd-guest.XXXXXX")
trap 'rm -rf "$RUN"' EXIT
[ -n "$OUT" ] || OUT=$RUN/out
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
# UML is uniprocessor, and every system call of the guest is a hand-over between two host processes:
# on one CPU that costs 22-27 us, across two 120-280 us.
CPU=${PLOOPD_GUEST_CPU:-$(taskset -pc $$ | sed 's/.*[ ,-]//')}
if command -v cc >/dev/null && cc -O2 -shared -fPIC -o "$RUN/shim.so" "$HERE/xstate_shim.c" -ldl; then
    PRELOAD=$RUN/shim.so
else
    PRELOAD=
fi
truncate -s "$SCRATCH" "$RUN/scratch.img"
mkfs.ext4 -q -F -E lazy_itable_init=1,lazy_journal_init=1 "$RUN/scratch.img"
{
    printf 'cd %q\n' "$PWD"
    export -p | grep -E '^declare -x (PATH|HOME|VIRTUAL_ENV|PYTHON[A-Z]*|PLOOPD_[A-Z_]*|CI|LANG|LC_ALL)='
    printf 'exec'
    printf ' %q' "$@"
    echo
} >"$RUN/cmd"
# hostfs holds a descriptor for every file that the guest has in its cache.
ulimit -Sn "$(ulimit -Hn)"
# The console must have an input that never ends, and stdin must not be a terminal shared with the
# caller.  --kill-after: a wedged guest ignores TERM.
timeout --kill-after=10 "$TIMEOUT" taskset -c "$CPU" \
    env ${PRELOAD:+LD_PRELOAD="$PRELOAD"} "$LINUX" mem="$MEM" \
    umid="ploopd$$" uml_dir="$RUN/uml/" root=/dev/root rootfstype=hostfs rootflags=/ ro quiet \
    init="$HERE/guest/init.sh" ubda="$RUN/scratch.img" con=null con0=null,fd:1 ssl=null \
    GUEST_RUN="$RUN" GUEST_OUT="$OUT" GUEST_MODULES="$MODULES" \
    GUEST_CHECKOUT="$HERE" ${INIT:+GUEST_INIT="$INIT"} </dev/null 2>"$RUN/err" |
    grep --line-buffered -avE '^(Core dump limits|\s+(soft|hard) -|Checking |Adding [0-9]+ bytes|SELinux: |mmapper_init|reboot: System halted)'
status=${PIPESTATUS[0]}
[ -s "$RUN/rc" ] && exit "$(cat "$RUN/rc")"
cat "$RUN/err" >&2
case $status in 124 | 137) exit 124 ;; esac
[ -e "$RUN/started" ] && exit 126
exit 125
