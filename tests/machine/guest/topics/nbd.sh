# The socket pbsfs-nbd@PROFILE and the kernel's nbd devices.

check_nbd_socket() {
    systemctl start pbsfs-nbd@home.socket
    same "before a client" inactive "$(state_of pbsfs-nbd@home.service)"
    fails denied as eve nbdinfo "$(nbd_uri $drive)"
    as jo nbdinfo --list "$(nbd_uri "")" | grep -F 'export="vm/100/latest/drive-scsi0.img"'
    same image "$expected" "$(as jo nbdcopy "$(nbd_uri $drive)" - | sha256sum | cut -d' ' -f1)"
    until_is inactive state_of pbsfs-nbd@home.service
    same socket active "$(state_of pbsfs-nbd@home.socket)"
    # And again, from the same socket.
    as jo nbdinfo --size "$(nbd_uri $drive)"
}

check_qemu_nbd() {
    systemctl start pbsfs-nbd@home.socket
    modprobe nbd max_part=16
    qemu-nbd --read-only --connect=/dev/nbd0 "$(nbd_uri $drive)" --format=raw
    until_is /dev/nbd0p1 ls /dev/nbd0p1
    same image "$expected" "$(sum /dev/nbd0)"
    same partitions "$(table "/mnt/local/$drive")" "$(table /dev/nbd0)"
    same read-only 1 "$(blockdev --getro /dev/nbd0)"
    same_partition /dev/nbd0p1
    qemu-nbd --disconnect /dev/nbd0
    until_is inactive state_of pbsfs-nbd@home.service
}

check_nbd_client() {
    systemctl start pbsfs-nbd@home.socket
    modprobe nbd max_part=16
    nbd-client -unix /run/pbsfs-nbd/home.sock /dev/nbd1 -name $drive -readonly
    until_is /dev/nbd1p1 ls /dev/nbd1p1
    same image "$expected" "$(sum /dev/nbd1)"
    same partitions "$(table "/mnt/local/$drive")" "$(table /dev/nbd1)"
    same_partition /dev/nbd1p1
    nbd-client -disconnect /dev/nbd1
    until_is inactive state_of pbsfs-nbd@home.service
}
