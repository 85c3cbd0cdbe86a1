#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# User data of a guest that is baked. cloud-init runs it as root at the end
# of the first boot. All that it leaves is in /run, that is in memory.
umask 077
mkdir -p /run/fastboot
cat > /run/fastboot/activator.py <<'END-OF-ACTIVATOR'
@activator.py@
END-OF-ACTIVATOR
cat > /run/fastboot/activator.sh <<'END-OF-ACTIVATOR'
@activator.sh@
END-OF-ACTIVATOR
port=/dev/virtio-ports/org.openstack.fastboot.0
[ -e $port ] || exit 0
# Kernels that leave plugged memory to user space switch it on themselves.
echo online > /sys/devices/system/memory/auto_online_blocks 2>/dev/null
# The Python of cloud-init: the only one that is sure to have it.
python=$(sed -n '1s/^#! *//p' "$(command -v cloud-init)" | head -n 1)
case "$python" in */env\ *) python=${python#*/env };; esac
# shellcheck disable=SC2086 # there may be options behind it
if $python /run/fastboot/activator.py --try 2>/dev/null; then
    set -- $python /run/fastboot/activator.py
    # Laid out alike in all guests that are baked, most of its memory is the
    # same in them, and is stored once. Copies of a guest share the layout
    # anyhow; what it starts later is laid out at random again.
    fixed="setarch $(uname -m) --addr-no-randomize env PYTHONHASHSEED=0"
    # shellcheck disable=SC2086 # these are words
    $fixed true 2>/dev/null && set -- $fixed "$@"
else
    set -- /bin/sh /run/fastboot/activator.sh
fi
# cloud-init waits for what it ran, and this waits for cloud-init. What user
# data leaves running outlives it, as with cloud-init's own unit: a daemon, or
# power_state, which waits for the end of cloud-init (its bug 2542).
if command -v systemd-run >/dev/null; then
    systemd-run --quiet --no-block --collect --unit=fastboot-activator \
        --property=DefaultDependencies=no --property=KillMode=process \
        --property=TasksMax=infinity "$@"
else
    setsid "$@" </dev/null >/dev/null 2>&1 &
fi
