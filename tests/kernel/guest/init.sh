#!/bin/sh
# Process 1 of the user-mode-linux guest (see run.sh).  Does nothing anywhere else.
[ $$ = 1 ] || { echo "init.sh: this is the guest's process 1" >&2; exit 1; }
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
off() { # containers have no poweroff
    poweroff -f 2>/dev/null
    echo o >/proc/sysrq-trigger
    sleep 10
    exit 1
}
mount -t proc proc /proc
RELEASE=$(uname -r)
mount -t tmpfs -o size=75% tmpfs /mnt
mkdir /mnt/upper /mnt/work /mnt/root
insmod "$GUEST_MODULES/$RELEASE/kernel/fs/overlayfs/overlay.ko"
mount -t overlay overlay -o lowerdir=/,upperdir=/mnt/upper,workdir=/mnt/work /mnt/root ||
    off
cd /mnt/root || off
mkdir -p .old out scratch lib/modules
mount -t hostfs -o "$GUEST_RUN" none mnt            # the command comes in here, its status goes out
mount -t hostfs -o "$GUEST_OUT" none out
mount -t hostfs -o "$GUEST_MODULES" none lib/modules
# Not chroot: the kernel's own request_module() runs /sbin/modprobe in the root of process 1.
pivot_root . .old
exec </dev/null
umount /.old/proc 2>/dev/null
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
mkdir -p /dev/pts /dev/shm
mount -t devpts devpts /dev/pts
mount -t tmpfs shm /dev/shm
ln -sfn /proc/self/fd /dev/fd
ln -sfn fd/0 /dev/stdin
ln -sfn fd/1 /dev/stdout
ln -sfn fd/2 /dev/stderr
mount -t tmpfs run /run
mkdir -p /run/lock
case $GUEST_CHECKOUT in
/tmp/*) ;; # it would be hidden; the overlay keeps what is written in memory all the same
*) mount -t tmpfs tmp /tmp ;;
esac
mount -t ext4 -o noatime /dev/ubda /scratch
ip link set lo up
hostname guest
: >/mnt/started
[ "${GUEST_INIT:-}" != systemd ] || . "$GUEST_CHECKOUT/booted/boot.sh" # does not come back
bash /mnt/cmd
echo $? >/mnt/rc
sync
umount /scratch
off
