/* SPDX-License-Identifier: GPL-2.0-only */
#undef TRACE_SYSTEM
#define TRACE_SYSTEM mshare

#if !defined(_MSHARE_TRACE_H) || defined(TRACE_HEADER_MULTI_READ)
#define _MSHARE_TRACE_H

#include <linux/tracepoint.h>
#include "mshare_uapi.h"

DECLARE_EVENT_CLASS(mshare_slot_event,
	TP_PROTO(const void *region, unsigned long addr, unsigned long host),
	TP_ARGS(region, addr, host),
	TP_STRUCT__entry(
		__field(const void *, region)
		__field(unsigned long, addr)
		__field(unsigned long, host)
	),
	TP_fast_assign(
		__entry->region = region;
		__entry->addr = addr;
		__entry->host = host;
	),
	TP_printk("region=%p addr=%lx host=%lx", __entry->region, __entry->addr, __entry->host)
);

DEFINE_EVENT(mshare_slot_event, mshare_graft,
	TP_PROTO(const void *region, unsigned long addr, unsigned long host),
	TP_ARGS(region, addr, host)
);

DEFINE_EVENT(mshare_slot_event, mshare_ungraft,
	TP_PROTO(const void *region, unsigned long addr, unsigned long host),
	TP_ARGS(region, addr, host)
);

TRACE_EVENT(mshare_fault,
	TP_PROTO(const void *region, unsigned long addr, unsigned long host, unsigned int flags,
		 unsigned int result),
	TP_ARGS(region, addr, host, flags, result),
	TP_STRUCT__entry(
		__field(const void *, region)
		__field(unsigned long, addr)
		__field(unsigned long, host)
		__field(unsigned int, flags)
		__field(unsigned int, result)
	),
	TP_fast_assign(
		__entry->region = region;
		__entry->addr = addr;
		__entry->host = host;
		__entry->flags = flags;
		__entry->result = result;
	),
	TP_printk("region=%p addr=%lx host=%lx flags=%x result=%x", __entry->region,
		  __entry->addr, __entry->host, __entry->flags, __entry->result)
);

TRACE_EVENT(mshare_flush,
	TP_PROTO(const void *region, unsigned long start, unsigned long end),
	TP_ARGS(region, start, end),
	TP_STRUCT__entry(
		__field(const void *, region)
		__field(unsigned long, start)
		__field(unsigned long, end)
	),
	TP_fast_assign(
		__entry->region = region;
		__entry->start = start;
		__entry->end = end;
	),
	TP_printk("region=%p start=%lx end=%lx", __entry->region, __entry->start, __entry->end)
);

TRACE_EVENT(mshare_layout,
	TP_PROTO(const void *region, unsigned int op, u64 offset, u64 size, int err),
	TP_ARGS(region, op, offset, size, err),
	TP_STRUCT__entry(
		__field(const void *, region)
		__field(unsigned int, op)
		__field(u64, offset)
		__field(u64, size)
		__field(int, err)
	),
	TP_fast_assign(
		__entry->region = region;
		__entry->op = op;
		__entry->offset = offset;
		__entry->size = size;
		__entry->err = err;
	),
	TP_printk("region=%p %s offset=%llx size=%llx err=%d", __entry->region,
		  __print_symbolic(__entry->op, { MSHAREFS_CREATE_MAPPING, "map" },
				   { MSHAREFS_UNMAP, "unmap" }, { MSHAREFS_PROTECT, "protect" }),
		  __entry->offset, __entry->size, __entry->err)
);

#endif

#undef TRACE_INCLUDE_PATH
#define TRACE_INCLUDE_PATH .
#undef TRACE_INCLUDE_FILE
#define TRACE_INCLUDE_FILE trace
#include <trace/define_trace.h>
