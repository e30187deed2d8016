"""The capture file, from the writing side: laid out whole, filled block by block, resumable after any kill.

layout      which dataset lies where            hdf5        types and datasets of HDF5, distrust of foreign files
creation    laying the file out, or not at all  lock        one writer at a time
writer      `CaptureWriter`                     transfer    from the device to the writer without holding up the model
direct      bytes past the page cache           integrity   every byte against its hash
"""
