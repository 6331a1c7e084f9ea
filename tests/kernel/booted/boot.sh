# Sourced by init.sh as process 1: systemd takes over, and the command of run.sh is one of its services.
# What a machine has that this guest does not need is masked; the rest is Debian's.
units=/etc/systemd/system
rm -rf "$units" /.dockerenv
mkdir -p "$units/multi-user.target.wants"
for unit in systemd-hwdb-update systemd-journal-catalog-update systemd-journal-flush systemd-logind \
    systemd-machine-id-commit systemd-pstore systemd-random-seed systemd-remount-fs systemd-timesyncd \
    systemd-udev-settle systemd-udev-trigger systemd-update-done systemd-update-utmp systemd-user-sessions \
    console-getty getty-static; do
    ln -s /dev/null "$units/$unit.service"
done
ln -s /dev/null "$units/proc-sys-fs-binfmt_misc.automount"
cat >"$units/guest.service" <<'END'
[Unit]
Description=The command of run.sh
After=basic.target dbus.service
Wants=dbus.service

[Service]
Type=exec
StandardOutput=tty
StandardError=tty
TTYPath=/dev/console
ExecStart=/bin/sh -c 'bash /mnt/cmd; echo $? >/mnt/rc; sync; umount /scratch; echo o >/proc/sysrq-trigger; sleep 10'
END
ln -s ../guest.service "$units/multi-user.target.wants/guest.service"
: >/etc/fstab
echo 0123456789abcdef0123456789abcdef >/etc/machine-id
# What this machine had before it was started again.
[ ! -e /out/disk/restore.sh ] || . /out/disk/restore.sh
exec /lib/systemd/systemd --show-status=0 --log-level=warning --log-target=journal-or-kmsg
