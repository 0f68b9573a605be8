#!/bin/sh
# As the official image: options are the server's, and root becomes the user valkey.
set -e
if [ "${1#-}" != "$1" ] || [ "${1%.conf}" != "$1" ]; then set -- valkey-server "$@"; fi
if [ "$1" = valkey-server ] && [ "$(id -u)" = 0 ]; then
    find . \! -user valkey -exec chown valkey '{}' +
    exec setpriv --reuid valkey --regid valkey --clear-groups "$0" "$@"
fi
umask 0077
exec "$@"
