#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# The activator where cloud-init's Python cannot be had as a module: two to
# three times slower than activator.py, and otherwise the same.
PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
export PATH
exec 3<>/dev/virtio-ports/org.openstack.fastboot.0

say() {
    read -r uptime _ < /proc/uptime
    # A host that has hung up must not stop us: writes would wait for it.
    timeout 1 echo "$1 $uptime${2:+ $2}" >&3
}

fail() {
    say FAILED
    rm -rf /run/fastboot
    exit 1
}

# Through a pipe: arguments of programs are for all to see.
randomize() {
    echo "$1" | perl -e '
        open(F, ">", "/dev/urandom") or die; $_ = <STDIN>; chomp;
        $b = pack("H*", $_);
        ioctl(F, 0x40085203, pack("ii", 8 * length($b), length($b)) . $b)
            or die;
        ioctl(F, 0x5207, 0) or die' 2>/dev/null && return
    echo "$1" | python3 -c '
import fcntl, struct, sys
b = bytes.fromhex(sys.stdin.readline())
with open("/dev/urandom", "wb") as f:
    fcntl.ioctl(f, 0x40085203, struct.pack("ii", len(b) * 8, len(b)) + b)
    fcntl.ioctl(f, 0x5207)'
}

blocks() {
    set -- /sys/devices/system/memory/memory[0-9]*
    echo $#
}

cpus() {
    grep -c ^processor /proc/cpuinfo
}

plug() {
    tries=0
    while :; do
        for one in /sys/devices/system/cpu/cpu[0-9]*/online; do
            [ "$(cat "$one")" = 1 ] || echo 1 > "$one"
        done
        for one in /sys/devices/system/memory/memory[0-9]*/state; do
            [ "$(cat "$one")" = online ] || echo online > "$one"
        done 2>/dev/null
        [ "$(cpus)" -ge "$1" ] && [ "$(blocks)" -ge "$2" ] && return
        tries=$((tries + 1))
        [ $tries -lt 40 ] || return 1
        sleep 0.2
    done
}

# See activator.py.
erase() {
    for one in /etc/ssh/ssh_host_*key* /var/lib/systemd/random-seed; do
        if [ -f "$one" ] && [ ! -L "$one" ]; then
            dd if=/dev/zero of="$one" bs="$(wc -c < "$one")" count=1 \
                conv=notrunc,fsync 2>/dev/null
        fi
    done
}

forget() {
    rm -rf /etc/ssh/ssh_host_*key* /var/lib/systemd/random-seed \
        /var/lib/dhcp/* /var/lib/dhclient/* /var/lib/dhcpcd/* \
        /etc/dhcpcd.duid /var/lib/wicked/* \
        /var/lib/NetworkManager/*.lease \
        /var/lib/NetworkManager/secret_key \
        /var/lib/systemd/network/* /run/systemd/netif/leases/*
}

key() {
    ssh-keygen -q -t ed25519 -N '' -C "root@$2" \
        -f "$1/ssh_host_ed25519_key" </dev/null
}

# Have in memory what a server needs first; as activator.py does.
rehearse() {
    randomize "$(head -c 64 /dev/urandom | od -An -v -tx1 | tr -d ' \n')"
    mkdir -p /run/fastboot/rehearsal
    key /run/fastboot/rehearsal rehearsal
    rm -rf /run/fastboot/rehearsal
    udevadm trigger --action=change --subsystem-match=block \
        --subsystem-match=memory --subsystem-match=net
    udevadm settle --timeout=10
}

names() {
    for one in /sys/class/net/*/device; do
        [ ! -e "$one" ] || basename "${one%/device}"
    done
}

linked() {
    for one in $(names); do
        [ "$(cat "/sys/class/net/$one/carrier")" = 1 ] || return
    done
}

# See activator.py.
links() {
    tries=0
    while [ "$(names | wc -l)" -lt "$1" ] && [ $tries -lt 40 ]; do
        tries=$((tries + 1))
        sleep 0.2
    done
    udevadm settle --timeout=10
    [ "$1" -gt 0 ] || return 0
    raised=
    for one in $(names); do
        [ $(($(cat "/sys/class/net/$one/flags") & 1)) = 0 ] || continue
        ip link set "$one" up && raised="$raised $one"
    done
    tries=0
    until linked || [ $tries -ge 3000 ]; do
        tries=$((tries + 1))
        sleep 0.2
    done
    for one in $raised; do
        ip link set "$one" down
    done
}

# An empty one is made anew by a boot that comes too soon; see activator.py.
machine_id() {
    printf %s "${1:+$(echo "$1" | tr -d -)
}" > /etc/machine-id
    if [ -f /var/lib/dbus/machine-id ] && [ ! -L /var/lib/dbus/machine-id ]
    then
        cat /etc/machine-id > /var/lib/dbus/machine-id
    fi
}

rename() {
    machine_id "$1"
    echo "$2" > /proc/sys/kernel/hostname
    echo "$2" > /etc/hostname
    forget
    [ ! -d /var/lib/systemd ] || (umask 077
        head -c 512 /dev/urandom > /var/lib/systemd/random-seed)
    [ ! -d /etc/ssh ] || key /etc/ssh "$2"
}

services() {
    systemctl list-units --type=service --state=running --no-legend \
        --plain --no-pager | while read -r name _; do
        case $name in
        systemd-journald.*|systemd-udevd.*|systemd-logind.*|dbus*|qemu-g*) ;;
        *getty*|user@*|cloud-*|fastboot-*|polkit.*) ;;
        *) echo "$name" ;;
        esac
    done
}

# Fill free memory with zeros, which cost nothing to save.
wipe() {
    count=$(($(sed -n 's/^MemFree: *\([0-9]*\) kB/\1/p' /proc/meminfo) \
        / 1024 - 16))
    mkdir -p /run/fastboot/fill
    mount -t tmpfs -o size=100% none /run/fastboot/fill || return
    dd if=/dev/zero of=/run/fastboot/fill/zeros bs=1M count=$count \
        2>/dev/null
    umount /run/fastboot/fill
}

if ! randomize "$(head -c 64 /dev/urandom | od -An -v -tx1 | tr -d ' \n')"
then
    say REFUSED
    exit 1
fi
tries=0
while [ ! -e /run/cloud-init/result.json ] && [ $tries -lt 180 ]; do
    sleep 1
    tries=$((tries + 1))
done
timeout 180 systemctl is-system-running --wait >/dev/null 2>&1
stopped=$(services)
# shellcheck disable=SC2086 # names of units have no spaces
[ -z "$stopped" ] || systemctl stop $stopped
machine=$(cat /etc/machine-id)
machine_id ''
erase
forget
rm -rf /var/lib/cloud/instance /var/lib/cloud/instances \
    /var/lib/cloud/data /var/lib/cloud/sem /run/cloud-init
find /var/log -maxdepth 1 -type f -newer /proc/1 \
    -exec truncate -s 0 {} +
before=$(blocks)
possible=$(sed 's/.*[,-]//' /sys/devices/system/cpu/possible)
say READY $((possible + 1))
while read -r word version uuid name clock count memory links entropy <&3
do
    case $word in
    QUIESCE)
        sync
        timeout 20 fstrim --all >/dev/null 2>&1
        echo 3 > /proc/sys/vm/drop_caches
        rehearse >/dev/null 2>&1
        wipe
        udevadm control --timeout=5 --stop-exec-queue
        say QUIET ;;
    ACTIVATE) break ;;
    esac
done
[ "$version" = 2 ] || fail
[ "$entropy" = - ] || randomize "$entropy" || fail
say RANDOM
date -s "@$clock" >/dev/null || fail
say CLOCK
size=$((0x$(cat /sys/devices/system/memory/block_size_bytes)))
plug "$count" $((before + memory * 1048576 / size)) || fail
say PLUGGED
rename "$uuid" "$name" || fail
say IDENTITY
udevadm control --timeout=5 --start-exec-queue
links "$links" 2>/dev/null
say LINKED
mkdir -p /run/cloud-init
: > /run/cloud-init/enabled
printf '%s\n' 'datasource_list: [ ConfigDrive, OpenStack, None ]' \
    'ssh_deletekeys: false' > /run/cloud-init/cloud.cfg
log=/var/log/cloud-init-output.log
status=0
cloud-init init --local >> $log 2>&1 || status=1
say LOCAL $status
for one in systemd-networkd systemd-resolved NetworkManager networking; do
    if [ $one = networking ] || echo "$stopped" | grep -q "^$one.service"
    then
        systemctl restart $one.service
        systemctl is-enabled --quiet $one-wait-online.service &&
            timeout 150 systemctl restart $one-wait-online.service
    fi
done 2>/dev/null
say NETWORK
cloud-init init >> $log 2>&1 || status=1
# shellcheck disable=SC2086
systemctl restart --no-block systemd-journald.service 'getty@*.service' \
    'serial-getty@*.service' $stopped
say SERVICES
cloud-init modules --mode=config >> $log 2>&1 || status=1
cloud-init modules --mode=final >> $log 2>&1 || status=1
# Not before it runs anew: it makes its directory again if it finds that its
# files are gone.
systemctl start systemd-journald.service
rm -rf "/var/log/journal/${machine:?}"
say DONE $status
rm -rf /run/fastboot
