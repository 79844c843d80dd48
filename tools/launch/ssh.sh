#!/usr/bin/env bash
# A run on hosts that are reached by ssh, one process on each with all of its GPUs:
#
#   tools/launch/ssh.sh host-a,host-b -- --config configs/base.py --workdir /shared/runs/base
#
# The checkout is at the same path on all hosts, with its .venv; keys, not passwords, open them. The first host is the
# coordinator: all reach it by the name that is given here, at port ${PORT:-1234}. Ctrl-C, or SIGTERM, stops all after
# saving. When a host was lost (exit code 5) the same command is run again, up to ${RESTARTS:-10} times.
# More for ssh: SSH_OPTIONS="-p 2222 -i key".
set -uo pipefail

if [ $# -lt 3 ] || [ "$2" != -- ]; then
    sed -n '2,/^set/{/^set/!s/^# \{0,1\}//p}' "$0" >&2
    exit 2
fi
IFS=, read -ra hosts <<<"$1"
shift 2
for host in "${hosts[@]:-}"; do
    [ -n "$host" ] || { echo "ssh.sh: a host without a name; allowed: host-a,host-b" >&2; exit 2; }
done
[[ "${PORT:-1234} ${RESTARTS:-10}" =~ ^[0-9]+\ [0-9]+$ ]] ||
    { echo "ssh.sh: PORT is ${PORT:-1234} and RESTARTS ${RESTARTS:-10}; allowed: whole numbers" >&2; exit 2; }
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
first=${hosts[0]#*@}
stopped=0
pid_file=/tmp/jaxlm-$$ # on each host, of the process there, by which it is told to stop

tell() { # SIGNAL
    stopped=1
    for i in "${!hosts[@]}"; do
        # shellcheck disable=SC2029,SC2086  # expanded here, and several words
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
            kill -0 "$pid" 2>/dev/null || break # else a signal came in between
        done
        [ $one -gt 128 ] && one=5 # ended by a signal, or ssh itself failed: that host is gone
        # What has to be mended counts for more than a host that is gone because of it.
        case $code in 0 | 5) [ $one = 0 ] || code=$one ;; esac
    done
    [ $code = 5 ] && [ $stopped = 0 ] && [ "$attempt" -lt "${RESTARTS:-10}" ] || exit $code
    echo "jaxlm: a host was lost; once more in 10 s" >&2
    sleep 10
    [ $stopped = 0 ] || exit $code
done
