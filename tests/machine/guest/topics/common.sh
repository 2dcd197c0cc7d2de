# What the checks share.

drive=vm/100/latest/drive-scsi0.img
hello=vm/100/latest/scsi0-p1/hello.txt
expected=$(cat /payload/expected)
hello_text=$(cat /payload/hello)

same() { # same <what> <expected> <got>
    [ "$2" = "$3" ] || { printf '%s: expected\n%s\ngot\n%s\n' "$@" >&2; exit 1; }
}
sum() { sha256sum <"$1" | cut -d' ' -f1; }
fails() { # fails <words of the error> <command…>
    local words=$1 said
    shift
    if said=$("$@" 2>&1); then echo "did not fail: $*" >&2; exit 1; fi
    [[ $said == *"$words"* ]] || { printf 'failed otherwise: %s\n%s\n' "$*" "$said" >&2; exit 1; }
}
until_is() { # until_is <expected> <command…>: within two minutes
    local wanted=$1 got
    shift
    { set +x; } 2>/dev/null
    for _ in $(seq 120); do
        got=$("$@" 2>&1) || true
        [ "$got" != "$wanted" ] || break
        sleep 1
    done
    set -x
    same "$*" "$wanted" "$got"
}
as() { # as <user> <command…>
    local user=$1
    shift
    setpriv --reuid "$user" --regid "$user" --init-groups env HOME="/home/$user" "$@"
}
type_of() { findmnt --noheadings --output FSTYPE --mountpoint "$1" || echo none; }
state_of() { systemctl show --property=ActiveState --value "$1"; }
nbd_uri() { echo "nbd+unix:///$1?socket=/run/pbsfs-nbd/home.sock"; }

# What fdisk says of a disk, without its name.
table() { fdisk --list "$1" | grep -E '^(Disklabel|Disk identifier|/)' | sed -E "s,^$1[-p]*,p,"; }
same_partition() { # same_partition <device of the partition>
    mount -o ro,noload "$1" /mnt/part
    same file "$hello_text" "$(cat /mnt/part/hello.txt)"
    same ext4 ext4 "$(type_of /mnt/part)"
    diff -r --no-dereference /mnt/part "/mnt/local/files/vm/100/latest/scsi0-p1"
    umount /mnt/part
}
