module example.com/ramdir

go 1.24
