# The root file system that mmdebstrap made; stands in for python:3.11-slim-bookworm where there is no image registry.
FROM scratch
ADD rootfs.tar /
ENV PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
CMD ["python3"]
