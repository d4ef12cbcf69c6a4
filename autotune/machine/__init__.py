"""What autotune runs on: processor, GPUs, memory, and the process itself.

    hardware, peaks, processor    what the machine is, and its measured peaks
    roofline                      formulas: intensity, ridge, floor
    device/                       what differs between a CPU and a GPU, behind one interface
    gpus, catalogue               GPU architectures by name; other machines by their data sheets
    busy                          CPU time that others took during a measurement
    cache_dir                     where results are kept on disk, for this user alone
    versions                      library releases that autotune was tested with
    ending, forking, outside      process exit, forked children, exceptions that come from outside
    intraop, spinning             intra-op threads of the calling thread; how long threads wait for each other

Nothing here depends on models or on tuning.
"""
