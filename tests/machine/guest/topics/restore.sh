# Restores in place onto block devices.

# A disk in the state of the first backup, and a device over it.
old_disk() {
    local first
    first=$(ls -d /mnt/local/vm/100/2* | head -n 1)
    cp --sparse=always "$first/drive-scsi0.img" /root/old.img
    losetup --find --show /root/old.img
}

check_in_place_loop() {
    local device
    device=$(old_disk)
    pbsfs export --in-place --datastore-dir /payload/datastore $drive "$device"
    same device "$expected" "$(sum "$device")"
    losetup --detach "$device"
    same file "$expected" "$(sum /root/old.img)"
}

check_in_place_dm() {
    local device
    device=$(old_disk)
    modprobe dm-mod
    dmsetup create target --table "0 $(blockdev --getsz "$device") linear $device 0"
    pbsfs export --in-place --dry-run --datastore-dir /payload/datastore $drive /dev/mapper/target
    pbsfs export --in-place --datastore-dir /payload/datastore $drive /dev/mapper/target
    same device "$expected" "$(sum /dev/mapper/target)"
    # The loop device is held by the other one, and that one by nobody.
    fails "" pbsfs export --in-place --datastore-dir /payload/datastore $drive "$device"
    dmsetup remove target
    losetup --detach "$device"
}

check_in_place_held() {
    local device
    device=$(old_disk)
    partx --add "$device"
    mount "${device}p1" /mnt/part
    fails "" pbsfs export --in-place --datastore-dir /payload/datastore $drive "$device"
    # What is mounted is as it was.
    grep -q 'day 1' /mnt/part/hello.txt
    umount /mnt/part
    partx --delete "$device"
    losetup --detach "$device"
}
