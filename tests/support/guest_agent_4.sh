#!/bin/sh
# Serves one virtio-serial port, named by the argument. The lines are described in mvm/guest/__init__.py.
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin HOME=/root USER=root LOGNAME=root
port=$1
limit=1048576
work=/run/mvm/$port
set -f
umask 077
trap : TERM # `halt` asks every process to end; this one goes last

say() { printf '\n%s\n' "$*" >&3; }
uptime() { read -r up rest </proc/uptime; }

# Each fork costs milliseconds here, and somebody waits: what the shell can do by itself it does, and a program stands by.
stand_by_to_mount() {
	[ ! -r "$work/mounter" ] || { read -r pid <"$work/mounter" && kill "$pid"; } 2>/dev/null
	rm -f "$work/disk" "$work/mounted"
	mkfifo "$work/disk" "$work/mounted"
	exec 7<>"$work/disk" 8<>"$work/mounted"
	/usr/lib/mvm/mounter <&7 >&8 3>&- 4>&- 7>&- 8>&- &
	echo $! >"$work/mounter"
}
set_hostname() {
	[ -n "$hostname" ] && printf '%s\n' "$hostname" >/proc/sys/kernel/hostname &&
		printf '%s\n' "$hostname" >/etc/hostname &&
		printf '127.0.0.1 localhost %s\n' "$hostname" >/etc/hosts
}
set_machine_id() { [ -n "$machine_id" ] && printf '%s\n' "$machine_id" >/etc/machine-id; }
set_mac() {
	read -r old </sys/class/net/eth0/address
	[ "$old" = "$mac" ] || ifconfig eth0 hw ether "$mac"
}
set_address() { ifconfig eth0 "$address" netmask "$netmask" broadcast + up; }
set_gateway() { ip route replace default via "$gateway"; }
set_data() {
	[ "$data" != 1 ] && return
	while read -r disk dir rest; do [ "$dir" = /data ] && return; done </proc/mounts
	for disk in vda vdb vdc; do
		serial=
		[ -r /sys/block/$disk/serial ] && read -r serial </sys/block/$disk/serial
		[ "$serial" = data ] || continue
		blockdev --flushbufs /dev/$disk && mount -t ext4 -o nosuid,nodev,noatime /dev/$disk /data
		return
	done
	echo there is none
	return 1
}
has_secrets() {
	while read -r disk dir rest; do [ "$dir" = /run/secrets ] && return; done </proc/mounts
	return 1
}
set_secrets() {
	[ "$secrets" = 1 ] || return 0
	has_secrets && return
	code=
	read -r disk </run/mvm/secrets && printf '%s\0\0\0\0\0\0\0\0' "$disk" >&7 && read -r -t 5 code <&8
	[ "$code" = 0 ] && return
	echo "mount: call ${code:-0} failed"
	stand_by_to_mount
	return 1
}
# What was read of them is overwritten where it is in memory, so that no snapshot has it. Through another mount: while
# a process has a file open there, nothing changes.
drop_secrets() {
	wiped=1
	has_secrets || return 0
	mkdir -p /run/mvm/wipe && mount -o bind /run/secrets /run/mvm/wipe || return
	umount /run/secrets || { umount /run/mvm/wipe; return 1; }
	wiped=
	mount -o remount,rw /run/mvm/wipe && set +f && shred -n 0 -z /run/mvm/wipe/* && wiped=1
	set -f
	umount /run/mvm/wipe
}
set_keys() {
	case $host_key:$authorized_key in -:* | *:-) echo a key is missing; return 1 ;; esac
	printf "$host_key" >/run/mvm/ssh/host_key && printf "$authorized_key\n" >/run/mvm/ssh/authorized_keys
}
# It listens from the start on, and each connection finds the key of the day.
set_ssh() {
	[ -r /run/mvm/ssh.pid ] && read -r pid </run/mvm/ssh.pid && kill -0 "$pid" && return
	/usr/lib/mvm/ssh
}

configure() { # ID KEY=VALUE...
	id=$1
	shift
	hostname= machine_id= mac= address= netmask= gateway= data= secrets= host_key= authorized_key= steps=
	for field; do
		case ${field%%=*} in
		hostname | machine_id | mac | address | netmask | gateway | data | secrets | host_key | authorized_key)
			eval "${field%%=*}=\${field#*=}" ;;
		esac
	done
	done= failed=
	for step in hostname machine_id mac address gateway data secrets keys ssh; do
		set_$step || { failed=$step; break; }
		done="$done $step"
	done >"$work/said" 2>&1
	[ -z "$failed" ] && say "$id" 0 $done || say "$id" 1 $failed: $(cat "$work/said")
}

status() { # ID
	uptime
	worker=
	for state in idle ready busy; do
		[ -e /run/mvm/worker-$state ] || continue
		[ -n "$worker" ] && [ /run/mvm/worker-$worker -nt /run/mvm/worker-$state ] || worker=$state
	done
	read -r cpu user nice system idle iowait irq softirq steal rest </proc/stat
	read -r load rest </proc/loadavg
	read -r received </sys/class/net/eth0/statistics/rx_bytes
	read -r sent </sys/class/net/eth0/statistics/tx_bytes
	say "$1" 0 "$up" ${worker:-unknown} $((user + nice + system + irq + softirq + steal)) "$load" "$received" "$sent"
}

# What is free is made zeros, which a template need not hold; what configure will read is read.
settle() {
	sync
	while read -r name free unit; do [ "$name" = MemFree: ] && break; done </proc/meminfo
	dd if=/dev/zero of=/dev/shm/zeros bs=64k count=$(((free - 16384) / 64)) 2>/dev/null
	rm /dev/shm/zeros
	cat /usr/sbin/dropbear /usr/lib/mvm/* >/dev/null
	dropbear -V >/dev/null 2>&1
}

# The workload is told first; then everything that can be read again from a disk is let go.
rest() {
	[ ! -x /etc/mvm/sleep ] || /etc/mvm/sleep || return
	sync
	drop_secrets && [ "$wiped" = 1 ] || return
	echo 3 >/proc/sys/vm/drop_caches && echo 1 >/proc/sys/vm/compact_memory
}

secrets() { # ID 0|1
	secrets=$2 does=drop_secrets
	[ "$secrets" = 1 ] && does=set_secrets
	$does >"$work/said" 2>&1 && say "$1" 0 || say "$1" 1 secrets: $(cat "$work/said")
}

keep() { head -c $((limit + 1)) >"$1"; cat >/dev/null; }
encoded() { if [ -s "$1" ]; then head -c $limit "$1" | base64 -w0; else printf -; fi; }

run() { # ID SECONDS BASE64
	rm -f "$work"/out "$work"/err "$work"/code "$work"/pid
	command=$(printf %s "$3" | base64 -d)
	{
		{
			{
				(exec setsid sh -c 'echo $$ >"$0"; cd; umask 022; exec sh -c "$1"' \
					"$work/pid" "$command" </dev/null 2>&6 3>&- 4>&- 6>&-)
				echo $? >"$work/code"
			} 6>&1 >&5 5>&- 2>/dev/null | keep "$work/err" # this shell's own words are not the command's
		} 5>&1 | keep "$work/out"
		echo "done $1" >&4
	} &
	# The client is silent until it has its reply: whatever comes, or the end of file, says that it has gone.
	{ read -r rest <&3; echo "gone $1" >&4; } &
	watch=$!
	code= end= gone=
	while read -r -t "$2" end id <&4 || { end=late; id=$1; }; do
		[ "$id" = "$1" ] || continue
		[ $end = done ] && break
		[ $end = gone ] && gone=1
		[ $end = late ] && [ -n "$code" ] && break # what it left behind holds the streams: it is let be
		code=124
		until [ -s "$work/pid" ] || [ -s "$work/code" ]; do usleep 5000; done
		read -r pid <"$work/pid" && kill -KILL -"$pid"
		set -- "$1" 2
	done 2>/dev/null
	kill -KILL $watch 2>/dev/null
	wait $watch 2>/dev/null
	[ -z "$gone" ] || return
	[ -n "$code" ] || read -r code <"$work/code"
	truncated=0
	for size in $(stat -c %s "$work/out" "$work/err"); do
		[ "$size" -le $limit ] || truncated=1
	done
	{
		printf '\n%s %s %s ' "$1" "$code" $truncated
		encoded "$work/out"
		printf ' '
		encoded "$work/err"
		echo
	} >&3
}

serve() { # ID VERB ARGUMENTS...
	case $port:$2 in
	mvm.agent.0:hello) read -r kernel </proc/sys/kernel/osrelease; uptime; say "$1" 0 4 "$up" "$kernel" ;;
	mvm.agent.0:ping) uptime; say "$1" 0 "$up" ;;
	mvm.agent.0:configure) id=$1; shift 2; configure "$id" "$@" ;;
	mvm.agent.0:status) status "$1" ;;
	mvm.agent.0:settle) error=$(settle 2>&1) && say "$1" 0 || say "$1" 1 $error ;;
	mvm.agent.0:sleep) rest >"$work/said" 2>&1 && say "$1" 0 || say "$1" 1 $(cat "$work/said") not ready ;;
	mvm.agent.0:secrets) secrets "$1" "$3" ;;
	mvm.agent.0:shutdown) say "$1" 0; exec /usr/lib/mvm/halt 3>&- ;;
	mvm.exec.?:exec) run "$1" "$3" "$4" ;;
	*) say "$1" 127 unknown request ;;
	esac
}

device=
while [ -z "$device" ]; do # a port's name arrives a little later than the port
	set +f
	for found in /sys/class/virtio-ports/*; do
		name=
		[ -r "$found/name" ] && read -r name <"$found/name"
		[ "$name" = "$port" ] && device=/dev/${found##*/}
	done
	set -f
	[ -n "$device" ] || usleep 5000
done
[ $port != mvm.moment.0 ] || exec /usr/lib/mvm/moment <>"$device" >&0 3>/dev/urandom
exec 3<>"$device"
mkdir -p "$work"
rm -f "$work/events"
mkfifo "$work/events"
exec 4<>"$work/events"
[ $port != mvm.agent.0 ] || stand_by_to_mount
while :; do
	if read -r line <&3; then
		case $line in *" .") serve ${line% .} ;; esac # others are halves
	else
		echo >&3 # no client: writing waits for the next one
	fi
done
