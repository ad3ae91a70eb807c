#!/bin/bash
# system.sh [build|judges|bench]: whether the system has what that needs; installs it with apt as root, else says in one line
# what is missing and how it is called here. It looks for the things themselves, not for packages: any distribution will do.
set -u -o pipefail

# name|how to see that it is there|apt|dnf|zypper|pacman
BUILD='python3|command -v python3|python3|python3|python3|python
a C compiler|command -v $(compiler)|gcc|gcc|gcc|gcc
Python.h|test -e "$(python3 -c "import sysconfig; print(sysconfig.get_path(\"include\"))")/Python.h"|python3-dev|python3-devel|python3-devel|python
ensurepip|python3 -c "import venv, ensurepip"|python3-venv|python3|python3|python
pkg-config|command -v pkg-config|pkg-config|pkgconf-pkg-config|pkg-config|pkgconf
fusermount3|command -v fusermount3|fuse3|fuse3|fuse3|fuse3
fuse3.pc|pkg-config --exists fuse3|libfuse3-dev|fuse3-devel|fuse3-devel|fuse3
xxhash.h|has_header xxhash.h|libxxhash-dev|xxhash-devel|xxhash-devel|xxhash
sqlite3.h|has_header sqlite3.h|libsqlite3-dev|sqlite-devel|sqlite3-devel|sqlite'
JUDGES='stress-ng|command -v stress-ng|stress-ng|stress-ng|stress-ng|stress-ng
fio|command -v fio|fio|fio|fio|fio'
BENCH='redis-server|command -v redis-server|redis-server|redis|redis|redis'

compiler() { echo "${CC:-$(command -v cc || echo gcc)}" | cut -d' ' -f1; }
has_header() { echo "#include <$1>" | ${CC:-$(compiler)} -E -x c - ; }
manager() { for one in apt-get dnf zypper pacman; do command -v $one >/dev/null && { echo $one; return; }; done; }

what=(); apt=(); dnf=(); zypper=(); pacman=()
look() {
  while IFS='|' read -r name probe of_apt of_dnf of_zypper of_pacman; do
    eval "$probe" >/dev/null 2>&1 </dev/null && continue
    what+=("$name"); apt+=($of_apt); dnf+=($of_dnf); zypper+=($of_zypper); pacman+=($of_pacman)
  done <<<"$1"
}
install_with_apt() {
  export DEBIAN_FRONTEND=noninteractive
  echo "installing ${apt[*]}"
  apt-get install -y --no-install-recommends "${apt[@]}" >/dev/null 2>&1 && return
  apt-get update -q >/dev/null && apt-get install -y --no-install-recommends "${apt[@]}" >/dev/null
}
advice() {
  case $(manager) in
    apt-get) echo "run: sudo apt-get install -y ${apt[*]}" ;;
    dnf) echo "run: sudo dnf install -y ${dnf[*]}" ;;
    zypper) echo "run: sudo zypper install -y ${zypper[*]}" ;;
    pacman) echo "run: sudo pacman -S --needed ${pacman[*]}" ;;
    *) echo "install ${apt[*]} (apt), ${dnf[*]} (dnf), ${zypper[*]} (zypper)" ;;
  esac
}

case ${1:-build} in
  build) look "$BUILD" ;;
  judges) look "$JUDGES" ;;
  bench) look "$BENCH" ;;
  *) echo "usage: system.sh [build|judges|bench]" >&2; exit 2 ;;
esac
[ ${#what[@]} = 0 ] && exit 0
if [ "$(id -u)" = 0 ] && [ "$(manager)" = apt-get ]; then
  install_with_apt
  exit
fi
missing=$(printf ', %s' "${what[@]}")
echo "missing: ${missing:2} - $(advice)" >&2
exit 1
