module moebius/examples/go

go 1.19
