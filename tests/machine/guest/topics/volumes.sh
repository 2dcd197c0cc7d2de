# Logical volumes and mirrors: pbsfs's view and the kernel's.

# The names, modes, owners, times, links, sizes and contents of all that is in a directory.
listing() { # pbsfs gives directories one link, which stands for an unknown number
    (cd "$1" && find . -path ./lost+found -prune -o -printf '%p %y %m %U %G %T@ %l' \
        \( -type f -printf ' %s' -o -true \) \( -type d -o -printf ' %n' \) -printf '\n' | sort)
    (cd "$1" && find . -type f -print0 | sort -z | xargs -0 -r sha256sum)
}

golden() { # the golden datastore, mounted
    mountpoint -q /mnt/golden || mount -t pbsfs /payload/golden/datastore /mnt/golden
}

compare() { # compare <kernel's> <pbsfs's>
    listing "$1" >/root/kernel.list
    listing "$2" >/root/pbsfs.list
    [ "$(wc -l </root/kernel.list)" -gt 3 ]
    diff /root/kernel.list /root/pbsfs.list
}

check_lvm() {
    golden
    local images=/mnt/golden/vm/320/latest files=/mnt/golden/files/vm/320/latest one two volume options
    one=$(losetup --find --show --read-only --partscan $images/drive-scsi0.img)
    two=$(losetup --find --show --read-only $images/drive-scsi1.img)
    until_is "${one}p3" ls "${one}p3"
    pvs
    ls $files
    vgchange --activate y --sysinit "$(vgs --noheadings --options vg_name | tr -d ' ')" || true
    for volume in root var stripe grown; do
        device=$(lvs --noheadings --options lv_path | tr -d ' ' | grep "/$volume$")
        options=ro,noload
        [ $volume != var ] || options=ro,norecovery
        mount -o $options "$device" /mnt/part
        compare /mnt/part "$(ls -d $files/*$volume | head -n 1)"
        umount /mnt/part
    done
    vgchange --activate n
    losetup --detach "$one" "$two"
}

# A thin pool has to be written to be activated: in an overlay that is discarded.
check_thin() {
    golden
    modprobe nbd max_part=16
    local image=vm/322/latest/drive-virtio3.img
    pbsfs nbd --cow --datastore-dir /payload/golden/datastore --socket /root/thin.sock $image &
    until_is /root/thin.sock ls /root/thin.sock
    qemu-nbd --connect=/dev/nbd2 "nbd+unix:///?socket=/root/thin.sock" --format=raw
    local group
    until_is "" bash -c "pvs /dev/nbd2 >/dev/null"
    group=$(pvs --noheadings --options vg_name /dev/nbd2 | tr -d ' ')
    vgchange --activate y "$group"
    mount -o ro,noload "/dev/$group/home" /mnt/part
    ls /mnt/golden/files/vm/322/latest
    compare /mnt/part "$(ls -d /mnt/golden/files/vm/322/latest/*home | head -n 1)"
    umount /mnt/part
    vgchange --activate n "$group"
    qemu-nbd --disconnect /dev/nbd2
    kill %1
    wait %1 || true
}

# Two disks of a mirror, made here, backed up, and assembled from the backup.
check_md() {
    local disk devices=()
    for disk in 0 1; do
        truncate --size=64M /root/md-$disk.img
        devices+=("$(losetup --find --show /root/md-$disk.img)")
    done
    mdadm --create /dev/md/made --run --level=1 --raid-devices=2 --metadata=1.2 "${devices[@]}"
    mkfs.ext4 -q /dev/md/made
    mount /dev/md/made /mnt/part
    cp -r /usr/lib/pbsfs/lib/python3*/site-packages/pbsfs /mnt/part/
    listing /mnt/part >/root/made.list
    umount /mnt/part
    mdadm --wait /dev/md/made || true
    mdadm --stop /dev/md/made
    losetup --detach "${devices[@]}"
    /usr/lib/pbsfs/bin/python3 -I - <<'PROGRAM'
from pathlib import Path
from pbsfs.base.names import ROOT_NAMESPACE, Group
from pbsfs.testing.writer import DatastoreWriter

disks = {f"drive-scsi{n}.img.fidx": Path(f"/root/md-{n}.img") for n in range(2)}
DatastoreWriter(Path("/root/store")).add_snapshot(Group(ROOT_NAMESPACE, "vm", "1").snapshot(1700000000), disks)
PROGRAM
    mkdir -p /mnt/md
    mount -t pbsfs /root/store /mnt/md
    devices=()
    for disk in 0 1; do
        devices+=("$(losetup --find --show --read-only /mnt/md/vm/1/latest/drive-scsi$disk.img)")
    done
    udevadm settle # it assembles what it finds
    mdadm --stop --scan
    ls /mnt/md/files/vm/1/latest
    mdadm --assemble --readonly /dev/md/backup "${devices[@]}"
    mount -o ro,noload /dev/md/backup /mnt/part
    listing /mnt/part >/root/backup.list
    diff /root/made.list /root/backup.list
    umount /mnt/part
    listing "$(ls -d /mnt/md/files/vm/1/latest/*md* | head -n 1)" >/root/backup.list
    diff /root/made.list /root/backup.list
    mdadm --stop /dev/md/backup
    losetup --detach "${devices[@]}"
    umount /mnt/md
}
