#!/bin/sh
# PID 1 of a guest: prepares the machine, runs the test groups that /tests/groups.sh names, and powers off. This is dash,
# which reaps every orphan that it is given while it waits for a command.
#
# Lines that start with @@ are for `cargo xtask vm`; they and the tests' output go to the second serial port, because the
# kernel writes its messages to the first whenever it likes.

export PATH=/usr/bin:/applets HOME=/root RUST_BACKTRACE=0
export ZINIT_TEST_ACTOR=/tests/bin/actor ZINIT_TEST_TOOL=/tests/bin/zinit-tracker

# The clock of the day is nobody else's.
export ZINIT_TEST_CLOCK=1

# Many tests wait most of the time.
export RUST_TEST_THREADS=4

/bin/busybox mkdir -p /applets
/bin/busybox --install -s /applets

/bin/busybox mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mkdir -p /dev/pts
mount -t devpts -o ptmxmode=666 devpts /dev/pts
chmod 1777 /tmp
mount -t securityfs securityfs /sys/kernel/security
# Both hierarchies, as the tests of cgroups want them; which controllers the first still has depends on the kernel.
mount -t tmpfs -o mode=755 tmpfs /sys/fs/cgroup
mkdir /sys/fs/cgroup/unified
mount -t cgroup2 cgroup2 /sys/fs/cgroup/unified
for controller in freezer memory; do
    mkdir "/sys/fs/cgroup/$controller"
    mount -t cgroup -o "$controller" "$controller" "/sys/fs/cgroup/$controller" || rmdir "/sys/fs/cgroup/$controller"
done
ip link set lo up

exec </dev/null >/dev/ttyS1 2>&1

say() { echo "@@ $*"; }

say fact release "$(uname -r)"
say fact preempt "$(dmesg | sed -n 's/.*Dynamic Preempt: *//p')"
say fact lsm "$(cat /sys/kernel/security/lsm)"
say fact lockdown "$(cat /sys/kernel/security/lockdown 2>/dev/null)"
say fact cgroup "$(ls /sys/fs/cgroup | tr '\n' ' ')"
say booted

# It says what it can without anything being loaded; in one line.
say doctor "$("$ZINIT_TEST_TOOL" --pins /sys/fs/bpf/zinit-doctor doctor --json | tr -d '\n')"

# group NAME SECONDS ARGUMENTS…: runs a test binary, in a session of its own as a terminal would.
group() {
    name=$1 seconds=$2
    shift 2
    say begin "$name"
    setsid --wait timeout --kill-after=5 "$seconds" "/tests/$name" --show-output "$@"
    say end "$name" "$?"
}
. /tests/groups.sh

# The kernel frees BPF objects a while after their last user is gone.
programs() { bpftool prog list | grep -o 'name zinit_.*' | cut -d' ' -f2; }
tries=0
while [ -n "$(programs)" ] && [ "$tries" -lt 50 ]; do
    tries=$((tries + 1))
    sleep 0.2
done
programs | while read -r name; do say left "program $name"; done
for pin in /sys/fs/bpf/zinit*; do
    [ -e "$pin" ] && say left "pin $pin"
done
for stat in /proc/[0-9]*/stat; do
    # Kernel threads descend from PID 2; of the others there is this shell alone, in whose name this line runs.
    read -r pid comm state parent rest <"$stat" || continue
    [ "$pid" = 1 ] || [ "$pid" = 2 ] || [ "$parent" = 2 ] || say left "process $pid $comm $state"
done

say done
poweroff -f
