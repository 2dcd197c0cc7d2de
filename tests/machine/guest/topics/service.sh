# The service pbsfs@PROFILE.

check_service_start() {
    systemctl start pbsfs@home.service
    same state active "$(state_of pbsfs@home.service)"
    # `start` returned after READY: the mount answers at once, and the status names it.
    ls /run/pbsfs/home/vm/100 >/dev/null
    [[ $(systemctl show --property=StatusText --value pbsfs@home.service) == */run/pbsfs/home* ]]
    # Stopped and started again, the same.
    systemctl restart pbsfs@home.service
    same "mounts" 1 "$(grep -c ' /run/pbsfs/home fuse.pbsfs' /proc/mounts)"
}

check_service_read() {
    systemctl start pbsfs@home.service
    same image "$expected" "$(as jo sha256sum /run/pbsfs/home/$drive | cut -d' ' -f1)"
    same file "$hello_text" "$(as jo cat /run/pbsfs/home/files/$hello)"
    same "root's" "$expected" "$(sum /run/pbsfs/home/$drive)"
    fails denied as eve ls /run/pbsfs/home
    fails "" as eve cat /run/pbsfs/home/files/$hello
}

check_service_closed() {
    systemctl start pbsfs@home.service
    local pid
    pid=$(systemctl show --property=MainPID --value pbsfs@home.service)
    same user "$(id -u pbsfs)" "$(stat --format=%u /proc/"$pid")"
    grep -E '^(NoNewPrivs:\s1|Seccomp:\s2)$' /proc/"$pid"/status | wc -l | grep -qx 2
    # The secret is not in what others can read of the process.
    same "secret in environ" 0 "$(grep --count --text --fixed-strings --file=/payload/secret "/proc/$pid/environ" || true)"
    same "secret in cmdline" 0 "$(grep --count --text --fixed-strings --file=/payload/secret "/proc/$pid/cmdline" || true)"
    fails denied as jo cat /run/credentials/pbsfs@home.service/proxmox-backup-client.password
    local unit most number
    for unit in pbsfs@home.service:2.0 pbsfs-nbd@home.service:1.5; do
        most=${unit#*:}
        number=$(systemd-analyze security --no-pager "${unit%:*}" | grep -oP 'exposure level for \S+: \K[0-9.]+')
        echo "$unit: $number"
        awk "BEGIN { exit !($number < $most) }"
    done
}

# With the drop-in of docs/guides/fstab.md.
check_service_elsewhere() {
    local drop_in=/etc/systemd/system/pbsfs@home.service.d
    mkdir -p /mnt/other $drop_in
    cat >$drop_in/override.conf <<'UNIT'
[Service]
ExecStartPre=
ExecStartPre=+/usr/bin/nsenter --target=1 --mount /usr/bin/pbsfs mount --attach-for pbsfs -o allow_other home: /mnt/other
ExecStart=
ExecStart=/usr/bin/pbsfs mount --foreground -o allow_other home: /mnt/other
ExecStopPost=
ExecStopPost=-+/usr/bin/nsenter --target=1 --mount /bin/umount --lazy --quiet /mnt/other
UNIT
    systemctl daemon-reload
    systemctl restart pbsfs@home.service
    same file "$hello_text" "$(as jo cat /mnt/other/files/$hello)"
    same "usual place" none "$(type_of /run/pbsfs/home)"
    systemctl stop pbsfs@home.service
    same stopped none "$(type_of /mnt/other)"
    rm -r $drop_in
    systemctl daemon-reload
}

# Kills the process of the service; returns when the next one serves.
kill_service() {
    local pid
    pid=$(systemctl show --property=MainPID --value pbsfs@home.service)
    systemctl kill --signal=KILL pbsfs@home.service
    tail --pid="$pid" -f /dev/null # until systemd knows
    until_is active state_of pbsfs@home.service
}

check_service_killed() {
    systemctl start pbsfs@home.service
    kill_service
    same file "$hello_text" "$(cat /run/pbsfs/home/files/$hello)"
    # Killed while a program has a file open: the mount is lazily gone, the next one works.
    exec 3</run/pbsfs/home/$drive
    kill_service
    same image "$expected" "$(sum /run/pbsfs/home/$drive)"
    fails "" head -c 1 <&3
    exec 3<&-
    systemctl stop pbsfs@home.service
    same stopped none "$(type_of /run/pbsfs/home)"
    same state inactive "$(state_of pbsfs@home.service)"
    # Stopped while a file is open.
    systemctl start pbsfs@home.service
    exec 3</run/pbsfs/home/$drive
    systemctl stop pbsfs@home.service
    same stopped none "$(type_of /run/pbsfs/home)"
    exec 3<&-
}
