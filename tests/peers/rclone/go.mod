module peers/rclone

go 1.25

require github.com/rclone/rclone v1.69.1
