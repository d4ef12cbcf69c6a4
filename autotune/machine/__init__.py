"""What autotune runs on: processor, GPUs, memory, and the process itself.

    hardware, peaks, processor    what the machine is and reaches, measured
    roofline                      formulas: intensity, ridge, floor
    device/                       what differs between a CPU and a GPU, behind one interface
    gpus, catalogue               GPU architectures by name; other machines by their data sheets
    busy                          what others took of the machine meanwhile
    cache_dir                     where results are kept on disk, for this user alone
    versions                      releases of the libraries that were tested
    ending, forking, outside      the process's end, its children, exceptions that are the user's own
    intraop                       threads of one operator

Nothing here knows of models or of tuning.
"""
