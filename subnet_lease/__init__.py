"""Who owns which pod subnet: the lease contract, the table of leases, and the store that holds them."""
