# Makes a root for the examples over this machine's, and goes into it. Arguments: a directory, caifs, rclone.
set -euo pipefail
dir=$1 caifs=$2 rclone=$3

# Mounts of tests that run beside this would live as long as this place.
timeout 10 umount -l -c -a -t fuse.caifs || :
mkdir "$dir/world"
mount -t tmpfs -o size=4g,mode=755 world "$dir/world"
mkdir "$dir/world/upper" "$dir/world/work" "$dir/world/root"
root=$dir/world/root
mount -t overlay world -o "lowerdir=/,upperdir=$dir/world/upper,workdir=$dir/world/work" "$root"
for there in dev sys proc; do
    mount --rbind "/$there" "$root/$there"
done
mount -t tmpfs -o mode=755 run "$root/run"
mount -t tmpfs -o mode=1777 tmp "$root/tmp"
mkdir -p "$root/world"
mount --bind "$dir/shared" "$root/world"
touch "$root/usr/bin/caifs" "$root/usr/bin/rclone-of-the-world"
mount --bind "$caifs" "$root/usr/bin/caifs"
mount --bind "$rclone" "$root/usr/bin/rclone-of-the-world"
ip link set lo up
cd /
exec chroot "$root" /bin/bash /world/inside.sh
