set -euo pipefail

# The lines of an example are often alternatives: a mount takes the place of the one before.
caifs() {
    local word
    if [[ ${1-} == mount ]]; then
        for word in "$@"; do
            if [[ $word != -* && -e $word ]] && [[ $(findmnt -rno FSTYPE --mountpoint "$word" || true) == fuse.caifs ]]; then
                command caifs umount "$word"
            fi
        done
    fi
    command caifs "$@"
}

# Waits until somebody listens on a port, for as long as a process lives.
__await() {
    until (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null; do
        kill -0 "${2:-$$}"
        sleep 0.02
    done
}

# Starts a server, and ends it when it has answered.
__serve() {
    local port=$1 pid
    shift
    command "$@" &
    pid=$!
    __await "$port" "$pid"
    kill -TERM "$pid"
    wait "$pid"
}
