#!/bin/sh
# Installs caifs, so that mount(8) and systemd know it, or takes it away again.
#
#   mount-helpers/install.sh [install | uninstall]
#
# What is installed (and what to set in the environment to have it elsewhere):
#
#   PREFIX      /usr/local             the program in bin, man pages in share/man, completions in share
#   SBINDIR     /sbin                  the links mount.caifs and mount.fuse.caifs: mount(8) looks nowhere else
#   UNITDIR     PREFIX/lib/systemd/system     caifs@.service
#   SYSCONFDIR  /etc                   caifs/mounts, for the instances of caifs@.service; never removed
#   CAIFS       target/release/caifs   the program to install
#   DESTDIR     (nothing)              put before every path, to make a package
#
# There is no umount helper: umount(8) unmounts caifs without one.
set -eu
# Whatever the caller's is: what is installed is for everybody.
umask 022

here=$(cd "$(dirname "$0")" && pwd)
PREFIX=${PREFIX:-/usr/local}
SBINDIR=${SBINDIR:-/sbin}
UNITDIR=${UNITDIR:-$PREFIX/lib/systemd/system}
SYSCONFDIR=${SYSCONFDIR:-/etc}
DESTDIR=${DESTDIR:-}
CAIFS=${CAIFS:-$here/../target/release/caifs}
bin=$PREFIX/bin/caifs

fail() {
    echo "install.sh: $*" >&2
    exit 1
}

case $PREFIX in
    /*) ;;
    *) fail "PREFIX must be an absolute path, not $PREFIX" ;;
esac

# put MODE SOURCE TARGET: a file, in place at once and never half written.
put() {
    mkdir -p "$DESTDIR$(dirname "$3")"
    cp "$2" "$DESTDIR$3.new"
    chmod "$1" "$DESTDIR$3.new"
    mv -f "$DESTDIR$3.new" "$DESTDIR$3"
}

# Calls "$1 SOURCE TARGET" for every man page that there is.
each_page() {
    for section in 1 5 7 8; do
        for page in "$here"/../man/*."$section"; do
            if [ -f "$page" ]; then "$1" "$page" "$PREFIX/share/man/man$section/${page##*/}"; fi
        done
    done
}

# Calls "$1 SHELL TARGET" for every shell that gets completions.
each_shell() {
    "$1" bash "$PREFIX/share/bash-completion/completions/caifs"
    "$1" zsh "$PREFIX/share/zsh/site-functions/_caifs"
    "$1" fish "$PREFIX/share/fish/vendor_completions.d/caifs.fish"
}

put_page() { put 644 "$1" "$2"; }
remove() { rm -f "$DESTDIR$2"; }

# The program writes its own; one for another machine cannot, and goes without.
put_completions() {
    written=$(mktemp)
    if "$CAIFS" completions "$1" >"$written" 2>/dev/null && [ -s "$written" ]; then put 644 "$written" "$2"; fi
    rm -f "$written"
}

install_all() {
    if [ ! -f "$CAIFS" ]; then fail "no program at $CAIFS (build it with cargo build --release, or set CAIFS)"; fi
    put 755 "$CAIFS" "$bin"
    mkdir -p "$DESTDIR$SBINDIR"
    for link in mount.caifs mount.fuse.caifs; do
        ln -sf "$bin" "$DESTDIR$SBINDIR/$link"
    done
    mkdir -p "$DESTDIR$UNITDIR"
    sed "s|/usr/bin/caifs|$bin|g" "$here/systemd/caifs@.service" >"$DESTDIR$UNITDIR/caifs@.service"
    chmod 644 "$DESTDIR$UNITDIR/caifs@.service"
    mkdir -p "$DESTDIR$SYSCONFDIR/caifs/mounts"
    each_page put_page
    each_shell put_completions
    reload
}

uninstall_all() {
    for link in mount.caifs mount.fuse.caifs; do
        # Only what points at us: another package may have its own.
        if [ "$(readlink "$DESTDIR$SBINDIR/$link" || true)" = "$bin" ]; then rm -f "$DESTDIR$SBINDIR/$link"; fi
    done
    rm -f "$DESTDIR$bin" "$DESTDIR$UNITDIR/caifs@.service"
    each_page remove
    each_shell remove
    reload
}

# systemd reads units when told to; a package's own scripts see to that.
reload() {
    if [ -z "$DESTDIR" ] && [ -d /run/systemd/system ]; then systemctl daemon-reload; fi
}

case ${1:-install} in
    install) install_all ;;
    uninstall) uninstall_all ;;
    *) fail "unknown command $1 (install or uninstall)" ;;
esac
