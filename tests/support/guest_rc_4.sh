#!/bin/sh
# Runs once, before the agents: file systems in memory and the loopback interface.
export PATH=/usr/sbin:/usr/bin
mount -t tmpfs -o mode=755,nosuid,nodev run /run
mkdir -p /dev/pts /dev/shm /run/mvm/ssh /run/secrets
chmod 700 /run/mvm /run/mvm/ssh
chmod 500 /run/secrets
for disk in /sys/block/vd*; do
	serial=
	read -r serial <$disk/serial
	[ "$serial" = secrets ] || continue
	echo /dev/${disk##*/} >/run/mvm/secrets
	echo 0 >$disk/queue/read_ahead_kb
done
mount -t devpts -o gid=5,mode=620,ptmxmode=666 devpts /dev/pts
mount -t tmpfs -o nosuid,nodev shm /dev/shm
ip link set lo up
/usr/lib/mvm/ssh
