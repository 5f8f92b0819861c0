module peers/desync

go 1.25.0

require github.com/folbricht/desync v1.0.4
