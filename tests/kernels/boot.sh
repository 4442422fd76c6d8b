#!/bin/busybox sh
# Process 1 of the emulated machine, from `python -m tests.kernels`: first in the initramfs, then (with the argument
# `passes`) on the root it has put together, which is the outer machine's below a layer in memory.
# Powers off at the end. On the second serial port, 0 says that all passes succeeded, 1 that one failed, and nothing that
# it did not come to that.

if [ "$1" != passes ]; then
  /bin/busybox --install -s /bin
  . /settings
  mount -t proc none /proc
  modprobe -a $root_modules
  mount -t 9p -o ro,trans=virtio,version=9p2000.L,msize=512000,cache=loose host /host &&
    mount -t tmpfs none /writes &&
    mkdir /writes/upper /writes/work &&
    mount -t overlay -o lowerdir=/host,upperdir=/writes/upper,workdir=/writes/work none /new ||
    poweroff -f
  umount /proc
  mount -t proc none /new/proc
  mount -t sysfs none /new/sys
  mount -t devtmpfs none /new/dev
  mkdir -p /new/dev/pts /new/dev/shm
  mount -t devpts none /new/dev/pts
  mount -t tmpfs none /new/dev/shm
  # Neither the outer machine's sockets nor its namespaces are here.
  mount -t tmpfs none /new/run
  mkdir /new/run/tmp
  cp /bin/busybox /settings /passes /init /new/run
  exec switch_root /new /run/busybox sh /run/init passes
fi

. /run/settings
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root TMPDIR=/run/tmp COLUMNS=120
# The kernel asks this program for modules as links, qdiscs and tables first need them.
ln -s busybox /run/modprobe
echo /run/modprobe >/proc/sys/kernel/modprobe
mkdir -p /lib/modules
ln -s "$modules" /lib/modules/
ip link set lo up
cd "$tree" || /run/busybox poweroff -f

failed=0
while read -r pass; do
  sh -c "$pass" </dev/null || failed=1
done </run/passes
echo $failed >/dev/ttyS1
/run/busybox poweroff -f
