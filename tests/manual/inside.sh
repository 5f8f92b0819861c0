# The world of the examples, from the inside: the files and servers they name. Then each of /world/scripts, in a fresh directory.
set -euo pipefail
export HOME=/root PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin LC_ALL=C.UTF-8
export S3_ACCESS_KEY=example-key S3_SECRET_KEY=example-secret S3_REGION=us-east-1
unset XDG_CONFIG_HOME XDG_RUNTIME_DIR CAIFS_CONFIG_DIR CAIFS_LOG CASYNC_SSH_PATH CASYNC_REMOTE_PATH SSH_AUTH_SOCK

rm -rf /etc/caifs /root/.ssh /root/.config /var/cache/caifs
mkdir -p /srv /mnt
mount -t tmpfs srv /srv
mount -t tmpfs mnt /mnt
mkdir -p /some /backups /var/cache /etc/fish/completions /usr/local/share/zsh/site-functions \
    /usr/share/bash-completion/completions
cat /world/hosts > /etc/hosts
cat /world/tls/ca.pem >> /etc/ssl/certs/ca-certificates.crt
ln -sf /usr/bin/caifs /sbin/mount.caifs
ln -sf /usr/bin/caifs /sbin/mount.fuse.caifs

# --- Files: what a fresh directory has, and what lies at fixed places.
mkdir -p /fixtures/tree/etc /fixtures/tree/doc /fixtures/target/release
cd /fixtures
echo 'LABEL=root / ext4 defaults 0 1' > tree/etc/fstab
echo example > tree/etc/hostname
echo 'Read me.' > tree/doc/readme.txt
head -c 1000000 /dev/urandom > tree/large
mkfs.ext4 -q -d tree image.raw 8M
touch disk.raw
cp /world/tls/server.pem c.pem
cp /world/tls/server.key k.pem
caifs make -s default.castr image.caibx image.raw
cp image.caibx app.caibx
caifs tar -i -s default.castr backup.caidx tree
caifs tar tree.catar tree
ln -s /usr/bin/caifs target/release/caifs
cp -a tree /some/tree
mv tree /srv/tree
cp -a default.castr /srv/store.castr
mkdir -p /srv/indexes /srv/www/images /srv/www/img /srv/s3/bucket/old
cp -a image.caibx backup.caidx tree.catar /srv/indexes/
cp -a default.castr /srv/indexes/
cp -a tree.catar /srv/home.catar
cp -a backup.caidx /srv/host.caidx
cp -a default.castr /srv/default.castr
cp -a backup.caidx /backups/home.caidx
cp -a default.castr /backups/
cp -a app.caibx image.caibx backup.caidx default.castr /srv/www/images/
cp -a image.caibx /srv/www/img/deb12.caibx
cp -a default.castr /srv/www/store
cp -a app.caibx image.caibx backup.caidx /srv/s3/bucket/
cp -a default.castr /srv/s3/bucket/store
cp -a default.castr /srv/s3/bucket/b
cp -a default.castr /srv/s3/b
cp -a default.castr /srv/store
mkdir /srv/idx
cp -a image.caibx backup.caidx /srv/idx/
cp -a backup.caidx /srv/x.caidx

# --- Servers: HTTPS and HTTP for every host, with S3's bucket on the same; SFTP and SSH.
cat > /run/nginx.conf <<'END'
daemon off; user root; pid /run/nginx.pid; error_log /world/nginx.log; worker_processes 1;
events { worker_connections 512; }
http {
    access_log off; client_max_body_size 0; etag on;
    client_body_temp_path /run/nginx-body; proxy_temp_path /run/nginx-proxy;
    fastcgi_temp_path /run/nginx-fastcgi; uwsgi_temp_path /run/nginx-uwsgi; scgi_temp_path /run/nginx-scgi;
    server {
        listen 127.0.0.1:80; listen 127.0.0.1:443 ssl http2;
        ssl_certificate /world/tls/server.pem; ssl_certificate_key /world/tls/server.key;
        root /srv/www; autoindex on;
        dav_methods PUT DELETE; create_full_put_path on;
        location ~ ^/(bucket|b)(/|$) { proxy_pass http://127.0.0.1:9000; proxy_set_header Host $http_host; proxy_request_buffering off; }
    }
}
END
nginx -e /world/nginx.log -c /run/nginx.conf &
rclone-of-the-world serve s3 --config '' --addr 127.0.0.1:9000 --auth-key "$S3_ACCESS_KEY,$S3_SECRET_KEY" /srv/s3 2>/world/rclone.log &
mkdir -p /run/sshd /root/.ssh
for user in backup bk; do
    sed -i "/^$user:/d" /etc/passwd
    echo "$user:x:0:0::/root:/bin/sh" >> /etc/passwd
done
ssh-keygen -q -t ed25519 -N '' -C host -f /run/host_key
ssh-keygen -q -t ed25519 -N '' -C user -f /root/.ssh/id_ed25519
cp /root/.ssh/id_ed25519.pub /root/.ssh/authorized_keys
echo "host $(cat /run/host_key.pub)" > /root/.ssh/known_hosts
chmod 700 /root/.ssh
cat > /run/sshd_config <<'END'
ListenAddress 127.0.0.1
HostKey /run/host_key
AuthorizedKeysFile /root/.ssh/authorized_keys
PermitRootLogin yes
StrictModes no
PasswordAuthentication no
KbdInteractiveAuthentication no
UsePAM no
Subsystem sftp internal-sftp
END
/usr/sbin/sshd -D -e -f /run/sshd_config 2>/world/sshd.log &
for port in 80 443 9000 22; do
    until (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; do sleep 0.02; done
done

# --- The scripts.
unmount_all() {
    local target loop file
    # Loops of a file in a mount first, while they show where it is: they end with the mount of them.
    losetup -nl -O NAME,BACK-FILE | while read -r loop file; do
        if [[ $file == /mnt/image/* ]]; then losetup -d "$loop"; fi
    done
    { grep -E ' (/mnt|/example)/[^ ]+ ' /proc/self/mountinfo || true; } | cut -d ' ' -f 5 | tac | while read -r target; do
        umount -l "$target"
    done
}

# Each process group that a script leaves is ended with it.
set -m
for script in /world/scripts/*.sh; do
    name=${script%.sh}
    # What an example of fstab left would let mount(8) find options that the next one does not give.
    : > /etc/fstab
    rm -rf /var/cache/caifs /etc/caifs /srv/cache.castr
    cp -a /fixtures /example
    { grep -oE '/mnt/[A-Za-z0-9_-]+' "$script" || true; } | sort -u | xargs -r mkdir -p
    cd /example
    timeout 120 bash "$script" > "$name.out" 2>&1 < /dev/null &
    group=$!
    if wait "$group"; then echo 0; else echo $?; fi > "$name.status"
    kill -KILL -- "-$group" 2>/dev/null || true
    cd /
    unmount_all >> "$name.out" 2>&1
    rm -rf /example /mnt/*
done
