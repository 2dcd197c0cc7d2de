# The package's life: an upgrade, a reboot in the middle of use, removal, and a shutdown without the server.

# A new version over a running service: it runs with the new one.
check_upgrade() {
    systemctl start pbsfs@home.service pbsfs-nbd@home.socket
    local before
    before=$(systemctl show --property=MainPID --value pbsfs@home.service)
    dpkg --install /payload/*.deb
    until_is active state_of pbsfs@home.service
    [ "$before" != "$(systemctl show --property=MainPID --value pbsfs@home.service)" ]
    same file "$hello_text" "$(cat /run/pbsfs/home/files/$hello)"
}

check_enable() {
    systemctl enable pbsfs@home.service pbsfs-nbd@home.socket
    systemctl start pbsfs@home.service pbsfs-nbd@home.socket
}

check_back_fstab() {
    systemctl --no-pager --failed
    until_is active state_of mnt-pbs.mount
    same "mount of fstab" fuse.pbsfs "$(type_of /mnt/pbs)"
    same image "$expected" "$(sum /mnt/pbs/$drive)"
    same local fuse.pbsfs "$(type_of /mnt/local)"
    same automount autofs "$(type_of /mnt/vm | tail -n 1)"
    same file "$expected" "$(sum /mnt/vm/latest/drive-scsi0.img)"
    same noauto none "$(type_of /home/jo/web1)"
    same failed "" "$(systemctl --no-legend --failed --plain | cut -d' ' -f1)"
}

check_back_service() {
    same state active "$(state_of pbsfs@home.service)"
    same image "$expected" "$(as jo sha256sum /run/pbsfs/home/$drive | cut -d' ' -f1)"
}

check_back_socket() {
    same state active "$(state_of pbsfs-nbd@home.socket)"
    same image "$expected" "$(as jo nbdcopy "$(nbd_uri $drive)" - | sha256sum | cut -d' ' -f1)"
}

# Away with the package, and its services with it; the mounts of fstab stay. Then all of it again.
check_remove() {
    dpkg --remove pbsfs
    same service none "$(type_of /run/pbsfs/home)"
    same fstab fuse.pbsfs "$(type_of /mnt/pbs)"
    same image "$expected" "$(sum /mnt/pbs/$drive)"
    [ ! -e /run/pbsfs-nbd/home.sock ]
    dpkg --install /payload/*.deb
    systemctl start pbsfs@home.service pbsfs-nbd@home.socket
    same file "$hello_text" "$(cat /run/pbsfs/home/files/$hello)"
}

# Before the reboot: programs that read, hold files and work in the mounts, and ignore SIGTERM.
check_busy() {
    local mount
    for mount in /mnt/pbs /mnt/local /run/pbsfs/home; do
        systemd-run --quiet --property=WorkingDirectory=$mount/vm/100 --property=KillMode=process --unit="busy-${mount//\//-}" \
            bash -c "trap '' TERM; exec 3<latest/drive-scsi0.img; while true; do cat latest/drive-scsi0.img >/dev/null; done"
        until_is active state_of "busy-${mount//\//-}.service"
    done
    losetup --find --read-only --partscan /mnt/pbs/$drive
}

# Before the shutdown: programs that wait for a server which cannot be reached any more.
check_stuck() {
    ip link set "$(ls /sys/class/net | grep -v lo)" down
    echo 3 >/proc/sys/vm/drop_caches
    systemd-run --quiet --unit=stuck cat /mnt/pbs/vm/100/2023-11-14T22:13:20Z/drive-scsi0.img
    systemd-run --quiet --unit=stuck-too cat /run/pbsfs/home/vm/100/2023-11-14T22:13:20Z/drive-scsi0.img
    sleep 5
    same state "active active" "$(echo $(systemctl is-active stuck stuck-too))"
}
