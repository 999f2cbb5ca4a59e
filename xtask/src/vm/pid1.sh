#!/bin/sh
# The services of a guest whose PID 1 is zinit, by their names, and what may run before it. Found through PATH.
#
# Lines that start with @@ are for `cargo xtask vm`; they go to the second serial port, because zinit and the kernel write to
# the first whenever they like.

# Held open: a line that was written by opening and closing the port, while signals came, has been lost.
[ "$1" = premount ] || exec 3>/dev/ttyS1

say() { echo "@@ $*" >&3; }

ready() { : >"/ready-$1"; }

# ends NAME: when asked to, says so and exits.
ends() { trap "trap '' TERM; say down $1; exit 0" TERM; }

# Waits for a signal; the child that it takes ends by itself if nobody ends it.
rest() {
    while :; do
        sleep 600 &
        wait "$!"
    done
}

# Calls a function with pid, command, state, parent and session of every process but PID 1, this shell, its children, and
# kernel threads, which descend from PID 2. Starts no process.
each_other() {
    for stat in /proc/[0-9]*/stat; do
        { read -r line <"$stat"; } 2>/dev/null || continue
        pid=${line%% *} comm=${line#*\(}
        comm=${comm%\)*}
        # shellcheck disable=SC2086
        set -- "$1" ${line##*\) }
        [ "$pid" = 1 ] || [ "$pid" = 2 ] || [ "$pid" = "$$" ] && continue
        [ "$3" = 2 ] || [ "$3" = "$$" ] || "$1" "$pid" "$comm" "$2" "$3" "$5"
    done
}

left() { say left "$1 $2 $3 $4"; }

zombie() { [ "$3" != Z ] || zombies="$zombies $1 ($2) of $4;"; }

# Daemons that have got away from their service's main process: a session of their own and PID 1 for a parent.
escaped() { [ "$2 $4 $5" != "sleep 1 $1" ] || escaped=$((escaped + 1)); }

# until_true TRIES COMMAND…
until_true() {
    tries=$1
    shift
    until "$@"; do
        tries=$((tries - 1))
        [ "$tries" -gt 0 ] || return 1
        sleep 0.2
    done
}

no_zombies() {
    zombies=
    each_other zombie
    [ -z "$zombies" ]
}

have_escaped() {
    escaped=0
    each_other escaped
    [ "$escaped" = 4 ]
}

all_run() {
    states=$(zinit list)
    for state in 'base: Running' 'daemons: Running' 'user: Running' 'flood: Success'; do
        case $states in *"$state"*) ;; *) return 1 ;; esac
    done
}

# Processes since the boot.
processes() { sed -n 's/^processes //p' /proc/stat; }

case $1 in
premount)
    # As an initramfs leaves it to an init: what is mounted must not be mounted again.
    shift
    mkdir -p /proc /sys
    mount -t proc proc /proc
    mount -t sysfs sysfs /sys
    mount -t devtmpfs devtmpfs /dev
    exec /usr/bin/zinit "$@"
    ;;
base)
    # The last to go: what it sees then is all that is left.
    trap 'trap "" TERM; each_other left; say down base; say alone; exit 0' TERM
    ready base
    rest
    ;;
daemons)
    ends daemons
    (setsid sleep 600 &)
    (setsid sh -c 'setsid sleep 600 & exit' &)
    (setsid setsid sleep 600 &)
    (
        trap '' TERM
        setsid sleep 600 &
    )
    until_true 300 have_escaped
    ready daemons
    rest
    ;;
user)
    ends user
    say services
    rest
    ;;
flood)
    before=$(processes) count=0
    while [ "$count" -lt 500 ]; do
        (/usr/bin/true &)
        kill -CHLD 1
        count=$((count + 1))
    done
    say fact forks "$(($(processes) - before))"
    ;;
driver)
    until_true 300 all_run || say missing "$states"
    until_true 300 no_zombies || say left "zombies: $zombies"
    until_true 10 have_escaped
    say fact escaped "$escaped"
    say fact release "$(uname -r)"
    say fact init "$(readlink /proc/1/exe)"
    while read -r _ _ _ _ path _; do
        say mount "$path"
    done </proc/self/mountinfo
    say ending
    zinit "$2" || say missing "an answer to zinit $2"
    ;;
esac
