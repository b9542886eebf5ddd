#!/bin/sh
# A tenant with three web servers, each with a page of its own: docs/examples/web-fleet.sh [TENANT]
# Needs a running stack (mvm up --detach). May be run again: what exists is used. Take it down with:
#   mvm instance destroy -y TENANT/web --all; mvm pool destroy -y TENANT/web; mvm tenant destroy -y TENANT
set -eu
tenant=${1:-shop}
pool=$tenant/web
count=3

# Runs a command; that something exists already (exit code 4) is fine.
ensure() {
    "$@" || { code=$?; [ "$code" = 4 ] || exit "$code"; }
}

# Fields of a JSON list, one line each: field NAME
field() {
    python3 -c 'import json, sys; [print(row[sys.argv[1]]) for row in json.load(sys.stdin)]' "$1"
}

ensure mvm tenant create "$tenant" --max-running "$count"
ensure mvm pool create "$pool" --flake builtin: --profile minimal --mem 128 --data-disk 32
mvm pool build "$pool"

have=$(mvm instance list --pool "$pool" -o json | field ref | wc -l)
[ "$have" -ge "$count" ] || mvm instance create "$pool" --count $((count - have))
mvm instance start "$pool" --all --parallel 2 --timeout 300

# Commands need no network; the pages are on the data disk, so they survive stops.
for ref in $(mvm instance list --pool "$pool" --status running -o json | field ref); do
    mvm instance exec "$ref" -- sh -c 'echo "hello from $(hostname)" >/data/index.html; pidof httpd || httpd -h /data'
done

# Guests of a tenant reach each other: ask all pages from the first guest.
addresses=$(mvm instance list --pool "$pool" --status running -o json | field guest_ip)
first=$(mvm instance list --pool "$pool" --status running -o json | field ref | head -n 1)
for address in $addresses; do
    mvm instance exec "$first" -- wget -q -O - "http://$address/"
done
