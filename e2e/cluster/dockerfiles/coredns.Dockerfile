FROM scratch
COPY coredns /coredns
USER 10001:10001
ENTRYPOINT ["/coredns"]
