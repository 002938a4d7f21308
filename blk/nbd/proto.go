package nbd

// The numbers of the protocol, all in network byte order. What is not here is not
// supported.
const (
	magicInit     = 0x4e42444d41474943 // NBDMAGIC
	magicOption   = 0x49484156454f5054 // IHAVEOPT
	magicOptReply = 0x3e889045565a9
	magicRequest  = 0x25609513 // NBD_REQUEST_MAGIC
	magicSimple   = 0x67446698 // NBD_SIMPLE_REPLY_MAGIC
	magicChunk    = 0x668e33ef // NBD_STRUCTURED_REPLY_MAGIC

	// Of the handshake: what the server offers is what a client may take.
	flagFixedNewstyle = 1 << 0 // NBD_FLAG_FIXED_NEWSTYLE
	flagNoZeroes      = 1 << 1 // NBD_FLAG_NO_ZEROES
)

// Options and the types of replies to them.
const (
	optExportName      = 1  // NBD_OPT_EXPORT_NAME
	optAbort           = 2  // NBD_OPT_ABORT
	optList            = 3  // NBD_OPT_LIST
	optStartTLS        = 5  // NBD_OPT_STARTTLS
	optInfo            = 6  // NBD_OPT_INFO
	optGo              = 7  // NBD_OPT_GO
	optStructuredReply = 8  // NBD_OPT_STRUCTURED_REPLY
	optListContexts    = 9  // NBD_OPT_LIST_META_CONTEXT
	optSetContexts     = 10 // NBD_OPT_SET_META_CONTEXT

	repAck     = 1 // NBD_REP_ACK
	repServer  = 2 // NBD_REP_SERVER
	repInfo    = 3 // NBD_REP_INFO
	repContext = 4 // NBD_REP_META_CONTEXT

	repErrUnsupported = 1<<31 + 1 // NBD_REP_ERR_UNSUP
	repErrPolicy      = 1<<31 + 2 // NBD_REP_ERR_POLICY
	repErrInvalid     = 1<<31 + 3 // NBD_REP_ERR_INVALID
	repErrUnknown     = 1<<31 + 6 // NBD_REP_ERR_UNKNOWN
	repErrTooBig      = 1<<31 + 9 // NBD_REP_ERR_TOO_BIG

	infoExport      = 0 // NBD_INFO_EXPORT
	infoName        = 1 // NBD_INFO_NAME
	infoDescription = 2 // NBD_INFO_DESCRIPTION
	infoBlockSize   = 3 // NBD_INFO_BLOCK_SIZE
)

// What an export can do.
const (
	canHasFlags    = 1 << 0  // NBD_FLAG_HAS_FLAGS
	canReadOnly    = 1 << 1  // NBD_FLAG_READ_ONLY
	canFlush       = 1 << 2  // NBD_FLAG_SEND_FLUSH
	canFUA         = 1 << 3  // NBD_FLAG_SEND_FUA
	canTrim        = 1 << 5  // NBD_FLAG_SEND_TRIM
	canWriteZeroes = 1 << 6  // NBD_FLAG_SEND_WRITE_ZEROES
	canDF          = 1 << 7  // NBD_FLAG_SEND_DF
	canMultiConn   = 1 << 8  // NBD_FLAG_CAN_MULTI_CONN
	canCache       = 1 << 10 // NBD_FLAG_SEND_CACHE
	canFastZero    = 1 << 11 // NBD_FLAG_SEND_FAST_ZERO
)

// Requests, their flags, and the errors they end with.
const (
	cmdRead        = 0 // NBD_CMD_READ
	cmdWrite       = 1 // NBD_CMD_WRITE
	cmdDisconnect  = 2 // NBD_CMD_DISC
	cmdFlush       = 3 // NBD_CMD_FLUSH
	cmdTrim        = 4 // NBD_CMD_TRIM
	cmdCache       = 5 // NBD_CMD_CACHE
	cmdWriteZeroes = 6 // NBD_CMD_WRITE_ZEROES
	cmdBlockStatus = 7 // NBD_CMD_BLOCK_STATUS

	flagFUA      = 1 << 0 // NBD_CMD_FLAG_FUA
	flagNoHole   = 1 << 1 // NBD_CMD_FLAG_NO_HOLE
	flagDF       = 1 << 2 // NBD_CMD_FLAG_DF
	flagOne      = 1 << 3 // NBD_CMD_FLAG_REQ_ONE
	flagFastZero = 1 << 4 // NBD_CMD_FLAG_FAST_ZERO

	errPerm     = 1   // NBD_EPERM
	errIO       = 5   // NBD_EIO
	errNoMem    = 12  // NBD_ENOMEM
	errInvalid  = 22  // NBD_EINVAL
	errNoSpace  = 28  // NBD_ENOSPC
	errNotSup   = 95  // NBD_ENOTSUP
	errShutdown = 108 // NBD_ESHUTDOWN
)

// Chunks of structured replies.
const (
	chunkDone = 1 << 0 // NBD_REPLY_FLAG_DONE

	chunkNone   = 0         // NBD_REPLY_TYPE_NONE
	chunkData   = 1         // NBD_REPLY_TYPE_OFFSET_DATA
	chunkHole   = 2         // NBD_REPLY_TYPE_OFFSET_HOLE
	chunkStatus = 5         // NBD_REPLY_TYPE_BLOCK_STATUS
	chunkError  = 1<<15 + 1 // NBD_REPLY_TYPE_ERROR
)

// The sizes of headers in bytes.
const (
	optionHeader  = 16
	requestHeader = 28
	oldPadding    = 124 // after the answer to NBD_OPT_EXPORT_NAME
)

// Limits, in bytes unless they say otherwise. The protocol has the first two.
const (
	// maxPayload is the most data that one request may move.
	maxPayload = 32 << 20
	// maxString bounds names and descriptions.
	maxString = 4096
	// maxOption bounds the data of an option.
	maxOption = 32 << 10
	// maxExtents bounds the ranges that one block status describes.
	maxExtents = 2048
)
