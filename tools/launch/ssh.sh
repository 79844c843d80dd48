#!/usr/bin/env bash
# Trains on several hosts over ssh, with one process on each that uses all of its GPUs:
#
#   tools/launch/ssh.sh host-a,host-b -- --config configs/base.py --workdir /shared/runs/base
#
# All hosts need the checkout, with its .venv, at the same path, and ssh logins by key. The first host is the
# coordinator: all reach it by the name given here, at port ${PORT:-1234}. Ctrl-C or SIGTERM stops all processes after
# saving. When a host is lost (exit code 5), the script runs the same command again, up to ${RESTARTS:-10} times.
# Options for ssh: SSH_OPTIONS="-p 2222 -i key".
set -uo pipefail

if [ $# -lt 3 ] || [ "$2" != -- ]; then
    sed -n '2,/^set/{/^set/!s/^# \{0,1\}//p}' "$0" >&2
    exit 2
fi
IFS=, read -ra hosts <<<"$1"
shift 2
for host in "${hosts[@]:-}"; do
    [ -n "$host" ] || { echo "ssh.sh: a host's name is empty; allowed: host-a,host-b" >&2; exit 2; }
done
[[ "${PORT:-1234} ${RESTARTS:-10}" =~ ^[0-9]+\ [0-9]+$ ]] ||
    { echo "ssh.sh: PORT is ${PORT:-1234} and RESTARTS ${RESTARTS:-10}; allowed: whole numbers" >&2; exit 2; }
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
first=${hosts[0]#*@}
stopped=0
pid_file=/tmp/jaxlm-$$ # on each host, has the process to signal

tell() { # SIGNAL
    stopped=1
    for i in "${!hosts[@]}"; do
        # shellcheck disable=SC2029,SC2086  # expanded here, into several words
        ssh ${SSH_OPTIONS:-} -o BatchMode=yes "${hosts[i]}" "kill -$1 \$(cat $pid_file-$i)" &
    done
}
trap 'tell INT' INT
trap 'tell TERM' TERM

for ((attempt = 0; ; attempt++)); do
    pids=()
    for i in "${!hosts[@]}"; do
        command=$(printf '%q ' .venv/bin/python -m jaxlm.main "$@" --coordinator "$first:${PORT:-1234}" \
            --num_processes "${#hosts[@]}" --process_id "$i")
        # shellcheck disable=SC2029,SC2086
        setsid ssh ${SSH_OPTIONS:-} -o BatchMode=yes "${hosts[i]}" \
            "cd $(printf %q "$root") && sh -c 'echo \$\$ >$pid_file-$i; exec \"\$@\"' - $command
            code=\$?; rm -f $pid_file-$i; exit \$code" </dev/null \
            > >(sed -u "s/^/${hosts[i]#*@}: /") 2> >(sed -u "s/^/${hosts[i]#*@}: /" >&2) &
        pids+=($!)
    done
    code=0
    for pid in "${pids[@]}"; do
        while true; do
            wait "$pid"
            one=$?
            kill -0 "$pid" 2>/dev/null || break # otherwise a signal interrupted the wait
        done
        [ $one -gt 128 ] && one=5 # a signal ended it or ssh failed: the host is lost
        # An error that must be fixed takes precedence over a host lost because of it.
        case $code in 0 | 5) [ $one = 0 ] || code=$one ;; esac
    done
    [ $code = 5 ] && [ $stopped = 0 ] && [ "$attempt" -lt "${RESTARTS:-10}" ] || exit $code
    echo "jaxlm: a host was lost; trying again in 10 s" >&2
    sleep 10
    [ $stopped = 0 ] || exit $code
done
