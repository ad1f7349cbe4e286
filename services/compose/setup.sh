#!/bin/sh
# Before anything else starts, each time: who owns /runs, and, the first time, the password of Redis.
set -eu

# The run belongs to the caller, who owns the checkout. Root's run is another's, in a folder of root's: nothing trains as root.
owner=$(stat -c %u:%g /caller)
if [ "$(stat -c %u /runs)" = 0 ]; then  # made by the engine, or root's own
    if [ "${owner%%:*}" = 0 ]; then
        chown 0:10001 /runs
        chmod 775 /runs
    else
        chown "$owner" /runs
    fi
fi
if [ -d /trainer-weights ]; then
    owner=$(stat -c %u:%g /runs)
    [ "${owner%%:*}" != 0 ] || owner=10001:10001
    chown "$owner" /trainer-weights
fi

# Redis is told a digest, and to let in one user who may do what a queue needs (docs/reliability.md).
umask 077
if [ ! -e /run/queue/url ]; then
    password=$(od -An -v -tx1 -N32 /dev/urandom | tr -d ' \n')
    digest=$(printf %s "$password" | sha256sum | cut -d ' ' -f 1)
    rights='resetkeys ~reward:* resetchannels -@all +@read +@write +@stream +@scripting +@connection +time -@dangerous'
    printf 'user default off\nuser reward on #%s %s\n' "$digest" "$rights" >/run/queue/users.acl
    printf 'redis://reward:%s@redis:6379' "$password" >/run/queue/url.new
    chown 10001:10001 /run/queue/users.acl /run/queue/url.new
    mv /run/queue/url.new /run/queue/url
    chmod 755 /run/queue
fi
