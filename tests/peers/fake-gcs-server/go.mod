module peers/fake-gcs-server

go 1.25

require github.com/fsouza/fake-gcs-server v1.52.2
