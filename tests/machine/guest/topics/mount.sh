# mount(8), fstab, automounts, and what the kernel makes of a mount: partitions of its images, NFS.

check_install() {
    dpkg --install /payload/*.deb
    getent passwd pbsfs
    systemctl cat pbsfs@home.service >/dev/null
    # An emulated processor needs longer to start a program than systemd waits.
    mkdir -p /etc/systemd/system.conf.d
    printf '[Manager]\nDefaultTimeoutStartSec=300s\n' >/etc/systemd/system.conf.d/start.conf
    systemctl daemon-reload
    for user in jo eve; do useradd --create-home "$user"; done
    usermod --append --groups pbsfs jo
}

# As docs/mount.md says.
check_config() {
    install -d /etc/pbsfs
    install -m 0640 -g pbsfs /payload/config.toml /etc/pbsfs/config.toml
    install -d -m 0700 /etc/credstore
    install -m 0600 /payload/secret /etc/credstore/pbsfs.home.password
    install -m 0600 /payload/secret /etc/pbsfs/password
    mkdir -p /mnt/pbs /mnt/vm /mnt/local /mnt/golden /mnt/part /mnt/nfs /home/jo/web1
    chown jo: /home/jo/web1
    PBS_PASSWORD_FILE=/etc/pbsfs/password pbsfs config check home
}

check_mount_8() {
    mount -t pbsfs home: /mnt/pbs -o allow_other,password-file=/etc/pbsfs/password
    same type fuse.pbsfs "$(type_of /mnt/pbs)"
    same image "$expected" "$(sum /mnt/pbs/$drive)"
    same file "$hello_text" "$(cat /mnt/pbs/files/$hello)"
    umount /mnt/pbs
    mount -t fuse.pbsfs home:files/$(dirname "$hello") /mnt/pbs -o password-file=/etc/pbsfs/password
    same file "$hello_text" "$(cat /mnt/pbs/hello.txt)"
    umount /mnt/pbs
    same type none "$(type_of /mnt/pbs)"
    fails "mount option 'nosuch' is not known" mount -t pbsfs home: /mnt/pbs -o nosuch
}

check_fstab() {
    cat >>/etc/fstab <<'FSTAB'
home:                 /mnt/pbs   pbsfs  _netdev,nofail,allow_other,password-file=/etc/pbsfs/password  0 0
home:files/host/web1  /home/jo/web1  pbsfs  noauto,user,_netdev  0 0
home:vm/100           /mnt/vm    pbsfs  noauto,_netdev,password-file=/etc/pbsfs/password,x-systemd.automount,x-systemd.idle-timeout=5s  0 0
/payload/datastore    /mnt/local pbsfs  nofail  0 0
FSTAB
    systemctl daemon-reload
    # With _netdev the mount is one of the remote ones, and the network comes first.
    local after wanted
    after=$(systemctl show --property=After --value mnt-pbs.mount)
    wanted=$(systemctl show --property=Wants --value remote-fs.target)
    [[ " $after " == *" network-online.target "* && " $wanted " == *" mnt-pbs.mount "* ]]
    systemctl start remote-fs.target local-fs.target
    systemctl start mnt-pbs.mount mnt-local.mount
    same image "$expected" "$(sum /mnt/pbs/$drive)"
    same image "$expected" "$(sum /mnt/local/$drive)"
    same noauto none "$(type_of /home/jo/web1)"
    systemctl stop mnt-local.mount
    same stopped none "$(type_of /mnt/local)"
    mount /mnt/local
    until_is active state_of mnt-local.mount
    umount /mnt/local
    until_is inactive state_of mnt-local.mount
    mount -a
    same "after mount -a" fuse.pbsfs "$(type_of /mnt/local)"
}

check_automount() {
    systemctl restart mnt-vm.automount
    same "before access" autofs "$(type_of /mnt/vm | tail -n 1)"
    same image "$expected" "$(sum /mnt/vm/latest/drive-scsi0.img)"
    same "after access" active "$(state_of mnt-vm.mount)"
    until_is inactive state_of mnt-vm.mount
    # Two programs trigger it at the same time.
    ls /mnt/vm >/dev/null & ls /mnt/vm/latest >/dev/null
    wait $!
    same "after access" active "$(state_of mnt-vm.mount)"
    systemctl stop mnt-vm.automount
    same "after the stop" none "$(type_of /mnt/vm)"
}

check_mount_user() {
    install -d -o jo -g jo /home/jo/.config /home/jo/.config/pbsfs
    { cat /payload/config.toml; echo 'password = { file = "~/.config/pbsfs/secret" }'; } >/home/jo/.config/pbsfs/config.toml
    install -m 0600 -o jo /payload/secret /home/jo/.config/pbsfs/secret
    chown jo: /home/jo/.config/pbsfs/config.toml
    as jo mount /home/jo/web1
    same type fuse.pbsfs "$(type_of /home/jo/web1)"
    as jo grep -q db2 /home/jo/web1/latest/root/etc/hosts
    fails "" as eve umount /home/jo/web1
    as jo umount /home/jo/web1
    same type none "$(type_of /home/jo/web1)"
}

check_partscan() {
    local device
    device=$(losetup --find --show --read-only --partscan /mnt/pbs/$drive)
    until_is "${device}p1" ls "${device}p1"
    same partitions "$(table "/mnt/local/$drive")" "$(table "$device")"
    same_partition "${device}p1"
    # The mount is busy as long as the device exists.
    fails busy umount /mnt/pbs
    losetup --detach "$device"
}

check_nfs() {
    echo '/mnt/pbs localhost(ro,fsid=8007,no_subtree_check,no_root_squash)' >/etc/exports
    systemctl start nfs-server.service
    exportfs -ra
    local version
    for version in 4.2 3; do
        mount -t nfs -o vers=$version,ro,nolock localhost:/mnt/pbs /mnt/nfs
        same image "$expected" "$(sum /mnt/nfs/$drive)"
        same file "$hello_text" "$(cat /mnt/nfs/files/$hello)"
        diff -r --no-dereference /mnt/pbs/files/host/web1 /mnt/nfs/files/host/web1
        diff -r --no-dereference /mnt/pbs/files/vm/100 /mnt/nfs/files/vm/100
        # A file held open, after both sides forgot what they knew.
        exec 3</mnt/nfs/$drive
        echo 3 >/proc/sys/vm/drop_caches
        same image "$expected" "$(sha256sum <&3 | cut -d' ' -f1)"
        exec 3<&-
        umount /mnt/nfs
    done
    exportfs -ua
    systemctl stop nfs-server.service
}
