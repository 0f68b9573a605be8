#!/bin/bash
# As the official image: GF_…__FILE names a file with the value.
set -euo pipefail
for variable in $(compgen -e GF_); do
    case $variable in
        *__FILE) export "${variable%__FILE}=$(< "${!variable}")"; unset "$variable" ;;
    esac
done
exec python3 -u /grafana.py
